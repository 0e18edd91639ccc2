//! Gaussian-process regression over mixed spaces.
//!
//! Covariance between configurations x and x′ of d parameters:
//!
//! k(x, x′) = c² + s²·Π_j k_j(x_j, x′_j) + Σ_j a_j²·k_j(x_j, x′_j),
//!
//! where k_j is Matérn-5/2 with its own length scale over the places of an ordered parameter, and exp(−w_j·[x_j ≠ x′_j])
//! over a nominal one. The product carries interactions, the sum main effects (which few observations suffice to
//! learn), and the constant c², which is not fitted, stands for the unknown mean. Observations carry Gaussian noise.

pub(crate) mod fit;
pub(crate) mod kernel;
pub(crate) mod posterior;
