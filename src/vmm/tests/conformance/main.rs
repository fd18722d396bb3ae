//! The same driver over both transports: what a device answers over vhost-user, as QEMU's guests have it, and over
//! virtio-mmio, as those of our own VMM do, is the same to the byte, whether the driver is good or hostile and whatever it
//! negotiated.
//!
//! | file | what |
//! | --- | --- |
//! | [`driven`] | the driver: requests, hostile chains, broken rings |
//! | [`transports`] | a device brought up over either transport |
//! | [`fs`], [`vsock`], [`console`], [`disk`], [`rng`], [`balloon`] | what is asked of each device |
//! | [`frozen`] | devices of machines that were stopped or frozen, which only our own VMM has |

#![allow(clippy::disallowed_methods, reason = "a test fails by panicking")]

use driven::{Driven, NEGOTIATED};

mod balloon;
mod console;
mod disk;
mod driven;
mod frozen;
mod fs;
mod rng;
mod transports;
mod vsock;

#[path = "../../../virtio/testkit.rs"]
#[expect(dead_code, reason = "shared with the tests of the devices")]
mod testkit;

/// Numbers that are the same each time (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u8) -> u8 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        u8::try_from(self.0 % u64::from(bound)).expect("below a byte")
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        let index = self.below(u8::try_from(from.len()).expect("few"));
        from[usize::from(index)]
    }
}

/// Fails at the first answer that differs.
fn assert_same(one: &[Vec<u8>], other: &[Vec<u8>]) {
    for (index, (one, other)) in one.iter().zip(other).enumerate() {
        assert_eq!(one, other, "answer {index}");
    }
    assert_eq!(one.len(), other.len());
}

/// Lets `answers` drive a device over both transports with whatever is negotiated, holds all that come against each other
/// and gives them.
fn same_answers(mut answers: impl FnMut(u64) -> [Vec<Vec<u8>>; 2]) -> Vec<Vec<u8>> {
    let mut plain: Option<Vec<Vec<u8>>> = None;
    for features in NEGOTIATED {
        for answers in answers(features) {
            assert_same(plain.get_or_insert_with(|| answers.clone()), &answers);
        }
    }
    plain.expect("something is negotiated")
}

/// A queue whose ring is broken in whatever way ends the device over either transport; `good` is a request in it.
fn assert_ends(mut both: impl FnMut() -> [Driven; 2], queue: usize, good: &[u8]) {
    for index in [Some(65), Some(3000), Some(u16::MAX), None] {
        for mut driven in both() {
            assert_eq!(driven.break_ring(queue, good, index), b"broken", "queue {queue}, {index:?}");
        }
    }
}
