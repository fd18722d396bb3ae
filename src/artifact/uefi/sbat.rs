//! SBAT: the `.sbat` section's lines of component, generation and where they come from, by which shim revokes.
//!
//! Lines are `component,generation,vendor,package,version,URL` (shim's SBAT.md); the first is that of `sbat` itself.

/// Longer ones are no list of components; shim's own is under 1 KiB.
const BYTES_MAX: usize = 16 << 10;

/// Why a `.sbat` section is not well formed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SbatError {
    /// Longer than any list of components.
    #[error("SBAT is {0} bytes long, of which 16 KiB are allowed")]
    Huge(usize),
    /// Not text, or without a newline at its end.
    #[error("SBAT is no text of whole lines of ASCII")]
    Text,
    /// A line that is not component and generation, and four more.
    #[error("SBAT line {0} is not `component,generation,vendor,package,version,URL`")]
    Line(usize),
    /// The first line is not that of SBAT.
    #[error("SBAT does not begin with a line for `sbat`")]
    First,
    /// The same component twice.
    #[error("SBAT has more than one line for `{0}`, and they differ")]
    Twice(String),
}

/// Checks `section`, and returns its text without the NULs that may end it.
///
/// # Errors
/// [`SbatError`].
pub fn check(section: &[u8]) -> Result<&str, SbatError> {
    let length = section.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let text = &section[..length];
    if text.len() > BYTES_MAX {
        return Err(SbatError::Huge(text.len()));
    }
    let text = std::str::from_utf8(text).map_err(|_| SbatError::Text)?;
    if !text.ends_with('\n') || !text.bytes().all(|byte| byte == b'\n' || matches!(byte, 0x20..=0x7e)) {
        return Err(SbatError::Text);
    }
    let mut seen: Vec<&str> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let fields: Vec<&str> = line.split(',').collect();
        let [component, generation, _, _, _, _] = fields[..] else { return Err(SbatError::Line(index + 1)) };
        // Others stop counting at the first byte that is no digit.
        let is_number = generation.bytes().all(|byte| byte.is_ascii_digit());
        if component.is_empty() || !is_number || matches!(generation.parse::<u32>(), Err(_) | Ok(0)) {
            return Err(SbatError::Line(index + 1));
        }
        if seen.is_empty() && component != "sbat" {
            return Err(SbatError::First);
        }
        if seen.contains(&component) {
            return Err(SbatError::Twice(component.to_owned()));
        }
        seen.push(component);
    }
    Ok(text)
}

/// The lines of `first`, and those of `second` for components that `first` has not.
///
/// # Errors
/// [`SbatError`]: of either, or that they say different things of one component.
pub fn merge(first: &[u8], second: &[u8]) -> Result<String, SbatError> {
    let mut merged = check(first)?.to_owned();
    for line in check(second)?.lines() {
        if !merged.lines().any(|known| known == line) {
            merged.push_str(line);
            merged.push('\n');
        }
    }
    check(merged.as_bytes())?;
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "sbat,1,SBAT Version,sbat,1,https://github.com/rhboot/shim/blob/main/SBAT.md\n";

    #[test]
    fn lists_are_merged_and_keep_each_component_once() {
        let stub = format!("{OWN}systemd,1,The systemd Developers,systemd,257,https://systemd.io/\n");
        let image = format!("{OWN}image,3,Me,image,1,https://me.example\n");
        let merged = merge(format!("{stub}\0\0").as_bytes(), image.as_bytes()).expect("two good lists");
        assert_eq!(merged, format!("{stub}image,3,Me,image,1,https://me.example\n"));
        let other = image.replace("image,3", "image,4");
        assert_eq!(merge(merged.as_bytes(), other.as_bytes()), Err(SbatError::Twice("image".to_owned())));
    }

    #[test]
    fn what_shim_could_misread_is_refused() {
        assert_eq!(check(b""), Err(SbatError::Text));
        assert_eq!(check(OWN.trim_end().as_bytes()), Err(SbatError::Text));
        assert_eq!(check(b"image,1,a,b,c,d\n"), Err(SbatError::First));
        // Generations that are none, or another to whoever counts otherwise.
        for generation in ["0", "", "-1", "+1", " 1", "1 ", "0x1", "1.0", "one", "4294967296"] {
            let line = format!("{OWN}image,{generation},a,b,c,d\n");
            assert_eq!(check(line.as_bytes()), Err(SbatError::Line(2)), "`{generation}`");
        }
        assert_eq!(check(format!("{OWN}image,1,a,b,c\n").as_bytes()), Err(SbatError::Line(2)));
        assert_eq!(check(format!("{OWN}image,1,a\0,b,c,d\n").as_bytes()), Err(SbatError::Text));
        assert!(matches!(check(OWN.repeat(400).as_bytes()), Err(SbatError::Huge(_))));
        assert!(check(format!("{OWN}\0").as_bytes()).is_ok());
    }
}
