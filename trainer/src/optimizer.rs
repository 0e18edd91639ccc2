//! AdamW with gradient clipping, and the learning rate's schedule.

use std::path::Path;

use tch::{Kind, Tensor};

use crate::{Error, Result, TrainConfig};

/// AdamW (Loshchilov, Hutter 2019, arXiv 1711.05101) over named f32 tensors. All its state is
/// tensors and one count, so that a checkpoint holds it bit for bit.
#[derive(Debug)]
pub(crate) struct AdamW {
    parameters: Vec<Parameter>,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    max_grad_norm: f64,
    /// Updates made so far.
    updates: u64,
}

#[derive(Debug)]
struct Parameter {
    name: String,
    tensor: Tensor,
    /// Running mean of the gradient.
    mean: Tensor,
    /// Running mean of its square.
    square: Tensor,
}

/// A gradient that is not finite.
#[derive(Debug)]
pub(crate) struct NotFiniteGradient {
    /// Name of the parameter.
    pub(crate) parameter: String,
}

impl AdamW {
    /// Fresh state for the given tensors.
    pub(crate) fn new(trainable: Vec<(String, Tensor)>, config: &TrainConfig) -> AdamW {
        let parameters = trainable
            .into_iter()
            .map(|(name, tensor)| {
                let zeros = || tensor.detach().zeros_like();
                Parameter {
                    mean: zeros(),
                    square: zeros(),
                    name,
                    tensor,
                }
            })
            .collect();
        AdamW {
            parameters,
            betas: config.betas,
            eps: config.eps,
            weight_decay: config.weight_decay,
            max_grad_norm: config.max_grad_norm,
            updates: 0,
        }
    }

    /// Forgets the gradients of the last step.
    pub(crate) fn zero_grad(&mut self) {
        self.parameters
            .iter_mut()
            .for_each(|parameter| parameter.tensor.zero_grad());
    }

    /// Clips, updates, and returns the gradient's norm before clipping:
    /// m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², θ ← (1 − λη)θ − η m̂ / (√v̂ + ε).
    pub(crate) fn step(
        &mut self,
        learning_rate: f64,
    ) -> std::result::Result<f64, NotFiniteGradient> {
        let norm = self.grad_norm()?;
        let clip = if self.max_grad_norm > 0.0 {
            (self.max_grad_norm / (norm + 1e-6)).min(1.0)
        } else {
            1.0
        };
        self.updates += 1;
        let [beta_1, beta_2] = self.betas;
        let correction_1 = 1.0 - beta_1.powf(self.updates as f64);
        let correction_2 = 1.0 - beta_2.powf(self.updates as f64);
        tch::no_grad(|| {
            for Parameter {
                tensor,
                mean,
                square,
                ..
            } in &mut self.parameters
            {
                let gradient = tensor.grad();
                if !gradient.defined() {
                    continue; // Not part of the graph of this step.
                }
                let gradient = gradient * clip;
                let _ = mean
                    .g_mul_scalar_(beta_1)
                    .g_add_(&(&gradient * (1.0 - beta_1)));
                let _ = square
                    .g_mul_scalar_(beta_2)
                    .g_add_(&(gradient.square() * (1.0 - beta_2)));
                let denominator = (&*square / correction_2).sqrt() + self.eps;
                let update = &*mean / denominator * (learning_rate / correction_1);
                let _ = tensor
                    .g_mul_scalar_(1.0 - learning_rate * self.weight_decay)
                    .g_sub_(&update);
            }
        });
        Ok(norm)
    }

    /// Writes the state to a safetensors file.
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        let mut tensors = vec![(
            "updates".to_owned(),
            Tensor::from_slice(&[self.updates as i64]),
        )];
        for Parameter {
            name, mean, square, ..
        } in &self.parameters
        {
            tensors.push((format!("{name}.mean"), mean.shallow_clone()));
            tensors.push((format!("{name}.square"), square.shallow_clone()));
        }
        write_tensors(&tensors, path)
    }

    /// Takes the state back from a file that [`AdamW::save`] wrote.
    pub(crate) fn load(&mut self, path: &Path) -> Result<()> {
        let tensors = read_tensors(path)?;
        let find = |name: &str| {
            tensors
                .iter()
                .find(|(of, _)| of == name)
                .map(|(_, tensor)| tensor)
        };
        let missing = |name: &str| Error::Tensors {
            action: "find all of",
            path: path.to_owned(),
            source: tch::TchError::Convert(format!("`{name}` is missing or has another shape")),
        };
        self.updates = find("updates")
            .ok_or_else(|| missing("updates"))?
            .int64_value(&[0]) as u64;
        for Parameter {
            name, mean, square, ..
        } in &mut self.parameters
        {
            for (part, state) in [("mean", mean), ("square", square)] {
                let name = format!("{name}.{part}");
                let saved = find(&name).filter(|saved| saved.size() == state.size());
                *state = saved
                    .ok_or_else(|| missing(&name))?
                    .to_device(state.device());
            }
        }
        Ok(())
    }

    /// L2 norm over all gradients.
    fn grad_norm(&self) -> std::result::Result<f64, NotFiniteGradient> {
        let mut sum = 0.0;
        for Parameter { name, tensor, .. } in &self.parameters {
            let gradient = tensor.grad();
            if gradient.defined() {
                let square = gradient.square().sum(Kind::Double).double_value(&[]);
                if !square.is_finite() {
                    return Err(NotFiniteGradient {
                        parameter: name.clone(),
                    });
                }
                sum += square;
            }
        }
        Ok(sum.sqrt())
    }
}

/// Learning rate of a step (from 0): a linear rise over the warm-up, then half a cosine that ends at
/// 0 after the last step.
pub(crate) fn learning_rate(config: &TrainConfig, step: u64, total_steps: u64) -> f64 {
    let warmup = (config.warmup_ratio * total_steps as f64).round();
    let step = step as f64;
    if step < warmup {
        return config.learning_rate * (step + 1.0) / warmup;
    }
    let progress = (step - warmup) / (total_steps as f64 - warmup).max(1.0);
    config.learning_rate * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
}

/// Writes named tensors as safetensors.
pub(crate) fn write_tensors(tensors: &[(String, Tensor)], path: &Path) -> Result<()> {
    let on_cpu: Vec<(&str, Tensor)> = tensors
        .iter()
        .map(|(name, tensor)| {
            (
                name.as_str(),
                tensor.detach().to_device(tch::Device::Cpu).contiguous(),
            )
        })
        .collect();
    Tensor::write_safetensors(&on_cpu, path).map_err(|source| Error::Tensors {
        action: "write",
        path: path.to_owned(),
        source,
    })
}

/// Reads named tensors from safetensors.
pub(crate) fn read_tensors(path: &Path) -> Result<Vec<(String, Tensor)>> {
    Tensor::read_safetensors(path).map_err(|source| Error::Tensors {
        action: "read",
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use caskd_models::SeededRng;

    use super::*;

    /// AdamW by hand in f64, one value at a time.
    fn reference(
        start: &[f64],
        gradients: &[Vec<f64>],
        config: &TrainConfig,
        rates: &[f64],
    ) -> Vec<f64> {
        let mut theta = start.to_vec();
        let (mut m, mut v) = (vec![0.0; start.len()], vec![0.0; start.len()]);
        for (step, (gradient, rate)) in gradients.iter().zip(rates).enumerate() {
            let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
            let clip = (config.max_grad_norm / norm).min(1.0);
            for i in 0..theta.len() {
                let g = gradient[i] * clip;
                m[i] = config.betas[0] * m[i] + (1.0 - config.betas[0]) * g;
                v[i] = config.betas[1] * v[i] + (1.0 - config.betas[1]) * g * g;
                let m_hat = m[i] / (1.0 - config.betas[0].powi(step as i32 + 1));
                let v_hat = v[i] / (1.0 - config.betas[1].powi(step as i32 + 1));
                theta[i] -= rate * config.weight_decay * theta[i];
                theta[i] -= rate * m_hat / (v_hat.sqrt() + config.eps);
            }
        }
        theta
    }

    #[test]
    fn it_is_adamw_with_clipping_and_survives_being_saved() {
        let config = TrainConfig {
            weight_decay: 0.1,
            max_grad_norm: 1.0,
            ..TrainConfig::default()
        };
        let mut rng = SeededRng::new(4);
        let mut draw = |n: usize| -> Vec<f64> { (0..n).map(|_| rng.normal()).collect() };
        let start = draw(6);
        let gradients: Vec<Vec<f64>> = (0..7)
            .map(|step| draw(6).iter().map(|g| g * 0.2 * step as f64).collect())
            .collect();
        let rates: Vec<f64> = (0..7).map(|step| learning_rate(&config, step, 7)).collect();
        let tensors = || -> Vec<(String, Tensor)> {
            let at = |range: std::ops::Range<usize>| {
                let values: Vec<f32> = start[range].iter().map(|&value| value as f32).collect();
                Tensor::from_slice(&values).set_requires_grad(true)
            };
            vec![("a".to_owned(), at(0..4)), ("b".to_owned(), at(4..6))]
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("optimizer.safetensors");
        let mut parameters = tensors();
        let clones = |of: &[(String, Tensor)]| {
            of.iter()
                .map(|(name, t)| (name.clone(), t.shallow_clone()))
                .collect()
        };
        let mut optimizer = AdamW::new(clones(&parameters), &config);
        for (step, gradient) in gradients.iter().enumerate() {
            if step == 3 {
                optimizer.save(&path).unwrap();
                parameters = parameters
                    .iter()
                    .map(|(name, tensor)| {
                        (name.clone(), tensor.detach().copy().set_requires_grad(true))
                    })
                    .collect();
                optimizer = AdamW::new(clones(&parameters), &config);
                optimizer.load(&path).unwrap();
            }
            optimizer.zero_grad();
            let factors =
                Tensor::from_slice(&gradient.iter().map(|&g| g as f32).collect::<Vec<_>>());
            let all = Tensor::cat(&[&parameters[0].1, &parameters[1].1], 0);
            (all * factors).sum(Kind::Float).backward();
            let norm = optimizer.step(rates[step]).unwrap();
            let expected = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
            assert!((norm - expected).abs() < 1e-5);
        }
        let expected = reference(&start, &gradients, &config, &rates);
        let got: Vec<f32> = parameters
            .iter()
            .flat_map(|(_, t)| Vec::<f32>::try_from(t.detach()).unwrap())
            .collect();
        for (got, expected) in got.iter().zip(&expected) {
            assert!(
                (f64::from(*got) - expected).abs() < 1e-5,
                "{got} and {expected}"
            );
        }
    }

    #[test]
    fn the_rate_rises_and_falls() {
        let config = TrainConfig {
            warmup_ratio: 0.2,
            learning_rate: 2.0,
            ..TrainConfig::default()
        };
        let rates: Vec<f64> = (0..10)
            .map(|step| learning_rate(&config, step, 10))
            .collect();
        assert_eq!(&rates[..3], [1.0, 2.0, 2.0]);
        assert!(rates.windows(2).skip(2).all(|pair| pair[1] < pair[0]) && rates[9] > 0.0);
        assert!(learning_rate(&config, 10, 10) < 1e-12);
        assert_eq!(learning_rate(&TrainConfig::default(), 0, 1), 1e-3);
    }

    #[test]
    fn a_gradient_that_is_not_finite_is_named() {
        let tensor = Tensor::from_slice(&[1f32]).set_requires_grad(true);
        let mut optimizer = AdamW::new(
            vec![("lora".to_owned(), tensor.shallow_clone())],
            &TrainConfig::default(),
        );
        (&tensor * f64::INFINITY).sum(Kind::Float).backward();
        assert_eq!(optimizer.step(1.0).unwrap_err().parameter, "lora");
        assert_eq!(tensor.double_value(&[0]), 1.0);
    }
}
