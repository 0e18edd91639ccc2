//! The same summary as [`summarize_logits`] by libtorch's operations, for logits on a GPU: only statistics and the kept
//! entries cross the bus.

use caskd_formats::{Statistics, TopK};
use tch::{Kind, Tensor};

use crate::Result;
use crate::error::torch;
use crate::statistics::summarize_logits;

/// Entries beyond K that are asked for. libtorch gives equal logits in any order; here the smaller id comes first.
const SPARE: i64 = 16;

/// Appends the summary of `logits` [N, V] in f32, on any device; the first row that is not finite as inner error.
pub(crate) fn summarize_on_device(
    logits: &Tensor,
    statistics: &mut Statistics,
    top_k: &mut TopK,
) -> Result<std::result::Result<(), usize>> {
    let reading = torch("reading statistics");
    let vocab_size = logits.size()[1];
    let k = top_k.k;
    let finite: Vec<bool> = Vec::try_from(logits.isfinite().all_dim(1, false)).map_err(&reading)?;
    if let Some(row) = finite.iter().position(|finite| !finite) {
        return Ok(Err(row));
    }
    let over_vocabulary = [1_i64];
    let over_vocabulary = over_vocabulary.as_slice();
    let mean = logits.mean_dim(over_vocabulary, true, Kind::Double);
    let deviation = logits - mean.to_kind(Kind::Float);
    let variance = deviation
        .square()
        .mean_dim(over_vocabulary, false, Kind::Double);
    drop(deviation);
    for (column, values) in [
        (&mut statistics.mean, mean.squeeze_dim(1)),
        (&mut statistics.std, variance.sqrt()),
        (&mut statistics.min, logits.amin(over_vocabulary, false)),
        (&mut statistics.max, logits.amax(over_vocabulary, false)),
        (
            &mut statistics.log_sum_exp,
            logits.logsumexp(over_vocabulary, false),
        ),
    ] {
        let values: Vec<f32> = Vec::try_from(values.to_kind(Kind::Float)).map_err(&reading)?;
        column.extend(values);
    }

    let asked = (k as i64 + SPARE).min(vocab_size);
    let (values, ids) = logits.topk(asked, -1, true, true);
    let values: Vec<f32> = Vec::try_from(values.reshape([-1])).map_err(&reading)?;
    let ids: Vec<i64> = Vec::try_from(ids.reshape([-1])).map_err(&reading)?;
    let asked = asked as usize;
    for (row, (values, ids)) in values
        .chunks_exact(asked)
        .zip(ids.chunks_exact(asked))
        .enumerate()
    {
        if k > 0 && (asked as i64) < vocab_size && values[k - 1] == values[asked - 1] {
            // More equal logits than spare entries: which of them were left out, only the whole row tells.
            let whole: Vec<f32> =
                Vec::try_from(logits.get(row as i64)).map_err(torch("reading a row of logits"))?;
            let mut unused = Statistics::default();
            if summarize_logits(&whole, vocab_size as usize, &mut unused, top_k).is_err() {
                return Ok(Err(row));
            }
            continue;
        }
        let mut entries: Vec<(f32, u32)> = values
            .iter()
            .zip(ids)
            .map(|(&value, &id)| (value, id as u32))
            .collect();
        entries.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        top_k.ids.extend(entries[..k].iter().map(|entry| entry.1));
        top_k
            .logits
            .extend(entries[..k].iter().map(|entry| entry.0));
    }
    Ok(Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn check(logits: &[f32], vocab_size: usize, k: usize) {
        let empty = || TopK {
            k,
            ..TopK::default()
        };
        let (mut fused, mut fused_top) = (Statistics::default(), empty());
        summarize_logits(logits, vocab_size, &mut fused, &mut fused_top).unwrap();
        let (mut device, mut device_top) = (Statistics::default(), empty());
        let tensor = Tensor::from_slice(logits).view([-1, vocab_size as i64]);
        summarize_on_device(&tensor, &mut device, &mut device_top)
            .unwrap()
            .unwrap();
        assert_eq!(fused_top.ids, device_top.ids);
        assert_eq!(fused_top.logits, device_top.logits);
        for (a, b) in [
            (&fused.mean, &device.mean),
            (&fused.std, &device.std),
            (&fused.min, &device.min),
            (&fused.max, &device.max),
            (&fused.log_sum_exp, &device.log_sum_exp),
        ] {
            assert_eq!(a.len(), logits.len() / vocab_size);
            for (a, b) in a.iter().zip(b) {
                assert!((a - b).abs() <= 1e-5 * a.abs().max(1.0), "{a} {b}");
            }
        }
    }

    #[test]
    fn it_says_what_the_fused_pass_says() {
        let wave: Vec<f32> = (0..3000).map(|i| (i as f32 * 0.7).sin() * 9.0).collect();
        check(&wave, 1000, 7);
        check(&wave, 1000, 1000);
        // Ties at the edge of K, few and many; a flat row; one hot entry.
        let steps: Vec<f32> = (0..2000).map(|i| ((i * 7919) % 40) as f32).collect();
        check(&steps, 500, 30);
        check(&steps, 500, 8);
        let mut flat = vec![1.5; 300];
        check(&flat, 100, 5);
        flat[250] = 40.0;
        check(&flat, 100, 1);
    }

    #[test]
    fn a_row_that_is_not_finite_is_named() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let logits = Tensor::zeros([3, 50], (Kind::Float, Device::Cpu));
            let _ = logits.get(1).get(49).fill_(f64::from(bad));
            let mut top_k = TopK {
                k: 2,
                ..TopK::default()
            };
            let found = summarize_on_device(&logits, &mut Statistics::default(), &mut top_k);
            assert_eq!(found.unwrap(), Err(1));
        }
    }
}
