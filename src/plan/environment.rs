//! A step's environment: the fixed part, the settings as the guest sees them, and what the step names.

use std::collections::BTreeMap;

/// The search path of every step.
pub const FIXED_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the files of shares show as their time, and `SOURCE_DATE_EPOCH`, where nothing else is said: 1980-01-01,
/// the earliest that zip archives can hold.
pub const DEFAULT_SOURCE_DATE_EPOCH: u64 = 315_532_800;

/// A variable that cannot be in an environment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvError {
    /// Neither `NAME=VALUE` nor a name.
    #[error("`{0}` is not NAME=VALUE or NAME")]
    Malformed(String),
    /// `NAME` alone, but the host has no such variable.
    #[error("the host's environment has no `{0}` to pass on")]
    Unset(String),
    /// A value that has to be a number.
    #[error("SOURCE_DATE_EPOCH is `{0}`, not a number of seconds")]
    Epoch(String),
}

/// The whole environment of a step, sorted by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment(BTreeMap<String, Vec<u8>>);

impl Environment {
    /// The fixed part.
    pub fn fixed() -> Self {
        let epoch = DEFAULT_SOURCE_DATE_EPOCH.to_string();
        let fixed = [
            ("PATH", FIXED_PATH),
            ("HOME", "/root"),
            ("LANG", "C.UTF-8"),
            ("LC_ALL", "C.UTF-8"),
            ("TZ", "UTC"),
            ("USER", "root"),
            ("LOGNAME", "root"),
            ("SHELL", "/bin/sh"),
            ("TERM", "dumb"),
            ("SOURCE_DATE_EPOCH", &epoch),
        ];
        Self(fixed.map(|(name, value)| (name.to_owned(), value.as_bytes().to_vec())).into())
    }

    /// Without even the fixed part.
    pub fn empty() -> Self {
        Self(BTreeMap::new())
    }

    /// Sets one variable.
    pub fn set(&mut self, name: &str, value: &[u8]) {
        self.0.insert(name.to_owned(), value.to_vec());
    }

    /// Adds what the step names: `NAME=VALUE`, or `NAME` to take the host's value, which `host` looks up.
    ///
    /// # Errors
    /// [`EnvError`].
    pub fn add(&mut self, text: &str, host: impl Fn(&str) -> Option<Vec<u8>>) -> Result<(), EnvError> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, value.as_bytes().to_vec()),
            None => (text, host(text).ok_or_else(|| EnvError::Unset(text.to_owned()))?),
        };
        if name.is_empty() || value.contains(&0) || name.contains('\0') {
            return Err(EnvError::Malformed(text.to_owned()));
        }
        self.set(name, &value);
        Ok(())
    }

    /// The value of `SOURCE_DATE_EPOCH`.
    ///
    /// # Errors
    /// [`EnvError::Epoch`] where the step set it to something that is not a number.
    pub fn source_date_epoch(&self) -> Result<u64, EnvError> {
        let value = self.0.get("SOURCE_DATE_EPOCH").map(Vec::as_slice).unwrap_or_default();
        let text = String::from_utf8_lossy(value);
        text.parse().map_err(|_| EnvError::Epoch(text.into_owned()))
    }

    /// Each name with its value, sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_slice()))
    }

    /// `NAME=VALUE` each, sorted.
    pub fn lines(&self) -> Vec<Vec<u8>> {
        self.iter().map(|(name, value)| [name.as_bytes(), b"=", value].concat()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_the_host_enters_unless_it_is_named() {
        let mut environment = Environment::fixed();
        let host = |name: &str| (name == "TOKEN").then(|| b"x".to_vec());
        environment.add("A=b=c", host).expect("well formed");
        environment.add("TOKEN", host).expect("the host has it");
        assert_eq!(environment.add("NONE", host), Err(EnvError::Unset("NONE".to_owned())));
        assert!(matches!(environment.add("=x", host), Err(EnvError::Malformed(_))));
        let lines = environment.lines();
        assert!(lines.contains(&b"A=b=c".to_vec()) && lines.contains(&b"TOKEN=x".to_vec()));
        assert!(lines.contains(&b"TZ=UTC".to_vec()));
    }
}
