//! Random numbers that follow from a seed, and bytes changed by them.

/// SplitMix64 (Steele, Lea and Flood 2014): equidistributed, and enough for choosing inputs.
pub struct Random(u64);

/// Numbers at which lengths, counts and signs go wrong.
const EDGES: [u64; 16] = [
    0,
    1,
    2,
    7,
    8,
    0x7f,
    0x80,
    0xff,
    0x100,
    0xfff,
    0x1000,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 63,
    u64::MAX,
];

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn u32(&mut self) -> u32 {
        let [a, b, c, d, ..] = self.u64().to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }

    pub fn u16(&mut self) -> u16 {
        let [a, b, ..] = self.u64().to_le_bytes();
        u16::from_le_bytes([a, b])
    }

    pub fn byte(&mut self) -> u8 {
        self.u64().to_le_bytes()[0]
    }

    /// Below `bound`, which is not 0.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.u64() % bound as u64).expect("below a usize")
    }

    /// True once in `times`.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// A number near an edge, or any.
    pub fn edge(&mut self) -> u64 {
        match self.below(4) {
            0 => self.u64(),
            1 => self.u64() % 64,
            _ => self.pick(&EDGES).wrapping_add(self.u64() % 3).wrapping_sub(1),
        }
    }

    /// [`Random::edge`] cut to 32 bits.
    pub fn edge32(&mut self) -> u32 {
        let [a, b, c, d, ..] = self.edge().to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.byte()).collect()
    }

    /// Changes `input` in one to four places; `other` is what may be mixed in.
    pub fn mutate(&mut self, input: &mut Vec<u8>, other: &[u8]) {
        for _ in 0..=self.below(4) {
            let at = self.below(input.len() + 1);
            let rest = input.len() - at;
            match self.below(8) {
                0 | 1 if rest > 0 => input[at] ^= 1 << self.below(8),
                2 if rest > 0 => input[at] = self.byte(),
                3 | 4 if rest > 0 => {
                    // A number of one of the four widths, in place.
                    let width = self.pick(&[1, 2, 4, 8]).min(rest);
                    let number = self.edge().to_le_bytes();
                    input[at..at + width].copy_from_slice(&number[..width]);
                }
                5 if rest > 0 => {
                    let end = at + 1 + self.below(rest.min(64));
                    input.drain(at..end);
                }
                6 if !other.is_empty() => {
                    let from = self.below(other.len());
                    let count = 1 + self.below((other.len() - from).min(128));
                    input.splice(at..at, other[from..from + count].iter().copied());
                }
                7 => input.truncate(at),
                _ => {
                    let fresh = self.byte();
                    input.insert(at, fresh);
                }
            }
        }
    }
}
