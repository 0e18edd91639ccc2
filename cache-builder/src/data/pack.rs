//! Short sequences put together into long ones.

use std::collections::BTreeMap;

use super::TokenizedSequence;

/// Packs whole sequences into ones of at most `max_len` tokens: the longest first, each into the fullest one that still
/// has room for it (best fit, decreasing). Inside a packed sequence and among them the order is that of the data, so
/// the result is a function of the sequences alone. The first token of each part is no target: what comes before it
/// is another record.
pub(crate) fn pack(sequences: Vec<TokenizedSequence>, max_len: usize) -> Vec<TokenizedSequence> {
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(sequences[index].token_ids.len()));
    let mut packs: Vec<Vec<usize>> = Vec::new();
    // Packs by the room they have left; the newest of equally full ones is taken.
    let mut by_room: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for index in order {
        let length = sequences[index].token_ids.len();
        let fitting = by_room.range(length..).next().map(|(&room, _)| room);
        let (pack, room) = if let Some(room) = fitting {
            let waiting = by_room.get_mut(&room);
            let pack = waiting.and_then(Vec::pop).unwrap_or_default();
            if by_room.get(&room).is_some_and(Vec::is_empty) {
                by_room.remove(&room);
            }
            (pack, room)
        } else {
            packs.push(Vec::new());
            (packs.len() - 1, max_len)
        };
        packs[pack].push(index);
        by_room
            .entry(room.saturating_sub(length))
            .or_default()
            .push(pack);
    }
    for pack in &mut packs {
        pack.sort_unstable();
    }
    packs.sort_unstable();
    let mut sequences: Vec<Option<TokenizedSequence>> = sequences.into_iter().map(Some).collect();
    packs
        .into_iter()
        .map(|pack| {
            let mut parts = pack.into_iter().filter_map(|index| sequences[index].take());
            let mut packed = parts.next().unwrap_or_default();
            for mut part in parts {
                packed.source.push('+');
                packed.source.push_str(&part.source);
                if let Some(first) = part.loss_mask.first_mut() {
                    *first = false;
                }
                packed.token_ids.append(&mut part.token_ids);
                packed.loss_mask.append(&mut part.loss_mask);
            }
            packed
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(name: u32, length: usize) -> TokenizedSequence {
        TokenizedSequence {
            source: format!("d:{name}"),
            token_ids: vec![name; length],
            loss_mask: vec![true; length],
        }
    }

    #[test]
    fn every_record_is_in_one_sequence_and_order_is_kept() {
        let lengths = [5, 3, 9, 2, 10, 1, 7, 4];
        let sequences: Vec<_> = lengths
            .iter()
            .zip(0..)
            .map(|(&length, name)| sequence(name, length))
            .collect();
        let packed = pack(sequences.clone(), 10);
        assert_eq!(packed.len(), 5, "41 tokens need 5 sequences of 10");
        let sources: Vec<&str> = packed.iter().map(|pack| pack.source.as_str()).collect();
        assert_eq!(sources, ["d:0+d:5+d:7", "d:1+d:6", "d:2", "d:3", "d:4"]);
        let mut lengths_again = [0; 8];
        for pack in &packed {
            assert!(pack.token_ids.len() <= 10 && pack.token_ids.len() == pack.loss_mask.len());
            assert!(pack.token_ids.is_sorted());
            pack.token_ids
                .iter()
                .for_each(|&name| lengths_again[name as usize] += 1);
        }
        assert_eq!(lengths_again, lengths);
        // No token is predicted from another record.
        assert_eq!(
            packed[0].loss_mask,
            [true, true, true, true, true, false, false, true, true, true]
        );
        assert_eq!(pack(sequences, 10), packed);
    }
}
