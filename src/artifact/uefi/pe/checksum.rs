//! CheckSum of an image's optional header: the sum that `CheckSumMappedFile` makes, which some firmware looks at.

/// Writes the sum of `bytes`, a whole image, at `at`: 16-bit words added with end-around carry, as if the four bytes
/// there were zero, and the file's length added.
pub(in crate::uefi) fn set_checksum(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    // A u64 holds the sum of 2^48 words, and carries can be added at the end.
    let (words, last) = bytes.as_chunks::<2>();
    let mut sum: u64 = words.iter().map(|word| u64::from(u16::from_le_bytes(*word))).sum();
    sum += last.iter().map(|byte| u64::from(*byte)).sum::<u64>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let sum = sum + u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    let sum = u32::try_from(sum & 0xffff_ffff).unwrap_or(u32::MAX);
    bytes[at..at + 4].copy_from_slice(&sum.to_le_bytes());
}
