//! The fs device as a frozen machine keeps it: whether its driver has begun to speak FUSE.
//!
//! Nothing else is known of a driver that has seen no share, and a device that has one is not frozen: what a guest was
//! told of a share would outlive the record of it.
//!
//! | bytes | what |
//! | --- | --- |
//! | 6 | `kilnfs` |
//! | 1 | version of this form, 1 |
//! | 1 | 1 after INIT, else 0 |

use crate::device::StateError;

const MAGIC: [u8; 6] = *b"kilnfs";
const VERSION: u8 = 1;

/// The bytes of a device whose driver has `started`.
pub fn encode(started: bool) -> Vec<u8> {
    [&MAGIC[..], &[VERSION, u8::from(started)]].concat()
}

/// Whether the driver had started.
///
/// # Errors
/// [`StateError::Malformed`].
pub fn decode(state: &[u8]) -> Result<bool, StateError> {
    match state.strip_prefix(&MAGIC) {
        Some([VERSION, started @ (0 | 1)]) => Ok(*started == 1),
        _ => Err(StateError::Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_comes_back_as_it_went() {
        for started in [false, true] {
            assert_eq!(decode(&encode(started)), Ok(started));
        }
    }

    #[test]
    fn what_is_no_state_is_refused() {
        let good = encode(true);
        let mut others: Vec<Vec<u8>> = (0..good.len()).map(|end| good[..end].to_vec()).collect();
        others.push([&good[..], &[0]].concat());
        for byte in 0..good.len() {
            let mut flipped = good.clone();
            flipped[byte] ^= 0x80;
            others.push(flipped);
        }
        for other in others {
            assert_eq!(decode(&other), Err(StateError::Malformed), "{other:?}");
        }
    }
}
