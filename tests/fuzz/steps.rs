//! Inputs that are steps, each an action (one byte), an argument (one byte), a length (two bytes) and so many bytes.

/// Action, argument, bytes.
pub type Step<'a> = (u8, u8, &'a [u8]);

/// The next step, and what follows it.
pub fn next(input: &[u8]) -> Option<(Step<'_>, &[u8])> {
    let ([action, argument, low, high], rest) = input.split_first_chunk()?;
    let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
    let (bytes, rest) = rest.split_at(length);
    Some(((*action, *argument, bytes), rest))
}

/// Where each step ends.
pub fn ends(input: &[u8]) -> Vec<usize> {
    let (mut ends, mut rest) = (Vec::new(), input);
    while let Some((_, behind)) = next(rest) {
        rest = behind;
        ends.push(input.len() - rest.len());
    }
    ends
}

/// Puts a step behind the others.
pub fn push(input: &mut Vec<u8>, action: u8, argument: u8, bytes: &[u8]) {
    input.extend([action, argument]);
    input.extend(u16::try_from(bytes.len()).expect("short").to_le_bytes());
    input.extend_from_slice(bytes);
}
