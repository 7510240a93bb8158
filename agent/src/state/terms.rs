//! How the path of terms is written down: a line of JSON, and a line with its checksum. A digit that
//! has rotted would still be JSON, and another history.

use tidemark_journal::{Ancestry, checksum::crc64};

/// The file's content.
///
/// # Errors
/// Those of the JSON encoder.
pub fn encode(ancestry: &Ancestry) -> serde_json::Result<Vec<u8>> {
    let json = serde_json::to_string(ancestry)?;
    let sum = crc64(json.as_bytes());
    Ok(format!("{json}\n{sum:016x}\n").into_bytes())
}

/// Reads a file's content. None if it is damaged.
pub fn decode(bytes: &[u8]) -> Option<Ancestry> {
    let text = std::str::from_utf8(bytes).ok()?.strip_suffix('\n')?;
    let (json, sum) = text.rsplit_once('\n')?;
    let sound = sum == format!("{:016x}", crc64(json.as_bytes()));
    serde_json::from_str(json).ok().filter(|_| sound)
}

#[cfg(test)]
mod tests {
    use tidemark_journal::{Seq, TermId};

    use super::*;

    #[test]
    fn any_flipped_bit_is_noticed() {
        let path = Ancestry::root(TermId([0x1a; 16])).fork(TermId([0x2b; 16]), Seq(70));
        let path = path.expect("a path");
        let bytes = encode(&path).expect("JSON");
        assert_eq!(decode(&bytes), Some(path));
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&damaged), None, "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert_eq!(decode(&bytes[..length]), None, "{length} bytes");
        }
    }
}
