//! Writes the golden cache of a tier, whose bytes `tests/golden/v1` keeps:
//!
//!     cargo run --release -p caskd-formats --example golden_cache -- sparse tests/golden/v1/sparse
//!
//! The values are made up from integers, so that every machine makes the same.
#![allow(clippy::print_stderr, clippy::unwrap_used)]

#[path = "../tests/golden_sample/mod.rs"]
mod golden_sample;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [tier, folder] = arguments.as_slice() else {
        eprintln!("golden_cache sparse|compact|exact FOLDER");
        std::process::exit(2);
    };
    golden_sample::write(tier, std::path::Path::new(folder));
}
