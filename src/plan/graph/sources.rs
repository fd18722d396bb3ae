//! The sources of a recipe: what names them, and what they may be fetched from.
//!
//! What a URL gives is believed by its digest. Without one in the recipe the first fetch decides, so that must come over
//! https, or never leave this host.

use kiln_digest::Digest;

use super::reader::Reader;
use super::{Source, SourceOrigin, is_commit};
use crate::plan::recipe::{Fault, SourceTable, StepTable, Text};

impl Reader<'_> {
    /// All sources of the recipe.
    pub fn all_sources(&self) -> Result<Vec<Source>, Fault> {
        self.recipe.sources.iter().map(|(name, table)| self.source(name, table)).collect()
    }

    /// The sources of a step: those it names, or all.
    pub fn sources(&self, table: &StepTable) -> Result<Vec<Source>, Fault> {
        let known = &self.recipe.sources;
        let Some(names) = &table.sources else { return self.all_sources() };
        let source = |name: &Text| {
            let found = known.get_key_value(name.get_ref().as_str());
            let names = known.keys().map(|name| name.get_ref().as_str());
            let (name, table) = found.ok_or_else(|| self.unknown(name, "source", names))?;
            self.source(name, table)
        };
        names.iter().map(source).collect()
    }

    fn source(&self, name: &Text, table: &SourceTable) -> Result<Source, Fault> {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+');
        if !name.get_ref().starts_with(|c: char| c.is_ascii_alphanumeric())
            || !name.get_ref().chars().all(good)
        {
            let message = format!("`{}` is no name for a file", name.get_ref().escape_debug());
            return Err(self.fault(name.span(), message));
        }
        let sha256 = table.sha256.as_ref().map(|text| {
            text.get_ref().parse::<Digest>().map_err(|error| self.fault(text.span(), error.to_string()))
        });
        let sha256 = sha256.transpose()?;
        let misplaced = |what: &Text, word: &str, with: &str| {
            self.fault(what.span(), format!("source `{}` has {word} without {with}", name.get_ref()))
        };
        let origin = match (&table.url, &table.git) {
            (Some(url), None) => {
                if let Some(rev) = &table.rev {
                    return Err(misplaced(rev, "rev", "git"));
                }
                let mut urls = Vec::new();
                for text in std::iter::once(url).chain(&table.mirrors) {
                    self.check_url(text, &["https", "http"], sha256.is_some())?;
                    urls.push(text.get_ref().clone());
                }
                SourceOrigin::Url { mirrors: urls.split_off(1), url: url.get_ref().clone() }
            }
            (None, Some(git)) => {
                if let Some(mirror) = table.mirrors.first() {
                    return Err(misplaced(mirror, "mirrors", "url"));
                }
                self.git(name, git, table.rev.as_ref(), sha256.is_some())?
            }
            (Some(_), Some(git)) => {
                let message = format!("source `{}` has both url and git", name.get_ref());
                return Err(self.fault(git.span(), message).hint("leave one of them out"));
            }
            (None, None) => {
                let message = format!("source `{}` comes from nowhere", name.get_ref());
                return Err(self.fault(name.span(), message).hint("say where with url, or with git and rev"));
            }
        };
        Ok(Source { name: name.get_ref().clone(), origin, sha256 })
    }

    fn git(
        &self,
        name: &Text,
        git: &Text,
        rev: Option<&Text>,
        has_digest: bool,
    ) -> Result<SourceOrigin, Fault> {
        let Some(rev) = rev else {
            let message = format!("source `{}` does not say which commit of the repository", name.get_ref());
            return Err(self.fault(git.span(), message).hint("rev = a commit's whole id, or a tag"));
        };
        let (url, text) = (git.get_ref(), rev.get_ref());
        if let Some(path) = url.strip_prefix("file:") {
            if path.starts_with('/') || path.is_empty() || path.contains('\0') {
                let message = format!("`{}` is no path relative to the recipe", url.escape_debug());
                let hint =
                    "write file:../repository; where a repository is on this host is nothing for a recipe";
                return Err(self.fault(git.span(), message).hint(hint));
            }
        } else {
            // A commit's id says what is in it, whoever sends it.
            self.check_url(git, &["https", "http", "git"], has_digest || is_commit(text))?;
        }
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+' | '/');
        let is_name = text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(good)
            && !text.contains("..")
            && !text.contains("//")
            && !text.ends_with(['/', '.'])
            && text.len() <= 200;
        if !is_name {
            let message = format!("`{}` names no commit or tag", text.escape_debug());
            return Err(self.fault(rev.span(), message));
        }
        let is_short = (7..64).contains(&text.len())
            && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
            && text.bytes().any(|byte| byte.is_ascii_digit());
        if is_short && !is_commit(text) {
            let message = format!("`{text}` is a part of a commit's id");
            return Err(self.fault(rev.span(), message).hint("`git rev-parse` prints the whole of it"));
        }
        Ok(SourceOrigin::Git { url: url.clone(), rev: text.clone() })
    }

    /// Refuses what is no URL of one of `schemes`, what would write a password into the lock, and what anybody on the way
    /// could change.
    fn check_url(&self, text: &Text, schemes: &[&str], is_known: bool) -> Result<(), Fault> {
        let url = text.get_ref();
        let fault = |message: String| self.fault(text.span(), message);
        let rest = url.split_once("://").filter(|(scheme, _)| schemes.contains(scheme));
        let is_sound = url.chars().all(|c| c.is_ascii_graphic()) && !url.contains(['"', '\\', '<', '>', '`']);
        let Some((scheme, rest)) =
            rest.filter(|(_, rest)| is_sound && !rest.starts_with(['/', '?', '#', '-']))
        else {
            let known = schemes.split_last().map_or_else(String::new, |(last, others)| match others {
                [] => (*last).to_owned(),
                _ => format!("{} or {last}", others.join(", ")),
            });
            return Err(fault(format!("`{}` is no URL of {known}", url.escape_debug())));
        };
        let host = rest.split(['/', '?', '#']).next().unwrap_or(rest);
        if host.contains('@') {
            let hint = "leave name and password out: they would be written into kiln.lock";
            return Err(fault("a URL of a source has a user in it".to_owned()).hint(hint));
        }
        let name = host.rsplit_once(':').map_or(host, |(name, port)| {
            if port.bytes().all(|byte| byte.is_ascii_digit()) { name } else { host }
        });
        let is_here = matches!(name, "localhost" | "127.0.0.1" | "[::1]");
        if scheme != "https" && !is_known && !is_here {
            let message = format!("anybody on the way could change what `{url}` gives");
            let hint = match schemes.contains(&"git") {
                true => "use https, or the commit's whole id as rev",
                false => "use https, or say its sha256",
            };
            return Err(fault(message).hint(hint));
        }
        Ok(())
    }
}
