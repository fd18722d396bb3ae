//! From the table of what a step boots to a [`Boot`]: words, patterns and statements read, and what does not go together
//! refused where it stands.

use std::ops::Range;

use kiln_artifact::fat::Label;
use toml::Spanned;

use super::reader::Reader;
use crate::plan::boot::{Alteration, Boot, Bus, Change, Expected, Trust};
use crate::plan::make::Pattern;
use crate::plan::recipe::{BootTable, ChangeTable, Expanded, Fault, Text};
use crate::plan::script::{self, ScriptError, Statement, Step};

const BUSES: [(&str, Bus); 4] =
    [("virtio", Bus::Virtio), ("nvme", Bus::Nvme), ("usb", Bus::Usb), ("sata", Bus::Sata)];

impl Reader<'_> {
    /// What `step` boots.
    pub fn boot(&self, step: &Expanded<'_>, table: &BootTable) -> Result<Boot, Fault> {
        let report = table.report.as_ref().map(|text| self.pattern(text)).transpose()?;
        if let (Some(text), Some(path)) = (&table.report, &report)
            && (path.text().is_empty() || path.has_star())
        {
            return Err(self.fault(text.span(), "report takes one folder below WORK".to_owned()));
        }
        let bus = match &table.bus {
            None => Bus::default(),
            Some(text) => {
                let known = BUSES.iter().find(|(word, _)| word == text.get_ref());
                known.map(|(_, bus)| *bus).ok_or_else(|| {
                    self.fault(text.span(), format!("there is no bus `{}`", text.get_ref()))
                        .hint("virtio, nvme, usb or sata")
                })?
            }
        };
        Ok(Boot {
            image: self.pattern(&table.image)?,
            bus,
            label: self.label(table.label.as_ref())?,
            trust: self.trust(table)?,
            tpm: table.tpm,
            expected: self.expected(step, table)?,
            ssh_key: table.ssh_key.as_ref().map(|text| self.source_path(text)).transpose()?,
            changes: table.change.iter().map(|change| self.change(change)).collect::<Result<_, _>>()?,
            report,
        })
    }

    fn trust(&self, table: &BootTable) -> Result<Trust, Fault> {
        let word = table.secure_boot.as_ref().map_or("off", |text| text.get_ref().as_str());
        let span = table.secure_boot.as_ref().map_or(table.image.span(), Text::span);
        match (word, &table.keys) {
            ("vendor", Some(keys)) => {
                let message = "with secure-boot = \"vendor\" the firmware has the vendor's keys";
                Err(self.fault(keys.span(), message.to_owned()).hint("secure-boot = \"keys\" or \"enroll\""))
            }
            ("off" | "setup", Some(keys)) => {
                let message = format!("with secure-boot = \"{word}\" the firmware has no keys");
                Err(self.fault(keys.span(), message).hint("secure-boot = \"keys\" or \"enroll\""))
            }
            ("off", None) => Ok(Trust::Off),
            ("setup", None) => Ok(Trust::Setup),
            ("vendor", None) => Ok(Trust::Vendor),
            ("keys", Some(keys)) => Ok(Trust::Keys(self.pattern(keys)?)),
            ("enroll", Some(keys)) => Ok(Trust::Enroll(self.pattern(keys)?)),
            ("keys" | "enroll", None) => {
                let fault = self.fault(span, format!("secure-boot = \"{word}\" takes the keys of a folder"));
                Err(fault.hint("keys = \"boot/efi/KEYS\", where a step with sign puts them"))
            }
            (other, _) => {
                let fault = self.fault(span, format!("`{other}` says nothing of Secure Boot"));
                Err(fault.hint("off, setup, vendor, keys or enroll"))
            }
        }
    }

    fn expected(&self, step: &Expanded<'_>, table: &BootTable) -> Result<Expected, Fault> {
        match (&table.expect, &table.script) {
            (Some(_), Some(script)) => {
                Err(self.fault(script.span(), format!("step `{}` has both expect and script", step.name)))
            }
            (None, None) => {
                let message = format!("step `{}` does not say what the image should do", step.name);
                let fault = self.fault(table.image.span(), message);
                Err(fault.hint("expect = \"\"\"…\"\"\", statements as `kiln boot` takes them"))
            }
            (None, Some(path)) => Ok(Expected::File(self.source_path(path)?)),
            (Some(text), None) => {
                let name = format!("step {},", step.name);
                let statements = script::parse(&name, text.get_ref())
                    .map_err(|error| self.fault(self.within(text, &error), error.problem.to_string()))?;
                if statements.is_empty() {
                    return Err(self.fault(text.span(), "nothing is expected here".to_owned()));
                }
                if table.report.is_none()
                    && statements.iter().any(|statement| matches!(statement.step, Step::Screenshot(_)))
                {
                    let fault = self.fault(text.span(), "a screenshot needs a folder to go to".to_owned());
                    return Err(fault.hint("report = \"FOLDER\""));
                }
                self.output_follows_ssh(text, &statements)?;
                Ok(Expected::Statements(statements))
            }
        }
    }

    fn output_follows_ssh(&self, text: &Text, statements: &[Statement]) -> Result<(), Fault> {
        let first = statements.iter().find(|s| matches!(s.step, Step::Ssh { .. } | Step::Output(_)));
        match first {
            Some(Statement { step: Step::Output(_), text: line, .. }) => {
                Err(self.fault(text.span(), format!("`{line}` has no command over ssh before it")))
            }
            _ => Ok(()),
        }
    }

    /// Where in the recipe a line of statements goes wrong; the whole text where it is written with escapes.
    fn within(&self, text: &Text, error: &ScriptError) -> Range<usize> {
        let span = text.span();
        let value = text.get_ref();
        let written = self.text.get(span.clone()).unwrap_or_default();
        let Some(inner) = written.find(value.as_str()).filter(|_| !value.is_empty()) else { return span };
        let lines = value.split_inclusive('\n').take(error.line - 1).map(str::len).sum::<usize>();
        let line = value.get(lines..).unwrap_or_default();
        let column = line.char_indices().nth(error.column - 1).map_or(line.trim_end().len(), |(at, _)| at);
        let end = lines + line.split('\n').next().unwrap_or_default().len();
        span.start + inner + lines + column..span.start + inner + end
    }

    fn source_path(&self, text: &Text) -> Result<String, Fault> {
        let path = text.get_ref();
        if path.is_empty() || path.starts_with('/') || path.split('/').any(|part| part == "..") {
            return Err(self.fault(text.span(), format!("`{path}` is no path in SRCDIR")));
        }
        Ok(path.clone())
    }

    fn change(&self, table: &Spanned<ChangeTable>) -> Result<Change, Fault> {
        let (span, table) = (table.span(), table.get_ref());
        let file = table.file.as_ref().map(|text| self.pattern(text)).transpose()?;
        let said = [table.flip.is_some(), table.text.is_some(), table.copy.is_some(), table.sign.is_some()];
        if said.into_iter().filter(|is_said| *is_said).count() != 1 {
            return Err(self.fault(span, "one of flip, text, copy and sign says what changes".to_owned()));
        }
        if let (Some(section), None) = (&table.section, &table.flip) {
            return Err(self.fault(section.span(), "`section` belongs to flip".to_owned()));
        }
        let what = if let Some(at) = &table.flip {
            let section = table.section.as_ref().map(|text| text.get_ref().clone());
            Alteration::Flip { section, at: *at.get_ref() }
        } else if let Some(text) = &table.text {
            Alteration::Text(text.get_ref().clone())
        } else if let Some(from) = &table.copy {
            Alteration::Copy(self.pattern(from)?)
        } else {
            match table.sign.as_ref().map(|text| (text.get_ref().as_str(), text.span())) {
                Some(("stranger", _)) => Alteration::Stranger,
                Some(("none", _)) | None => Alteration::Unsigned,
                Some((other, span)) => {
                    let fault = self.fault(span, format!("nobody is called `{other}` here"));
                    return Err(fault.hint("sign = \"none\" or \"stranger\""));
                }
            }
        };
        Ok(Change { file: file.unwrap_or_else(Pattern::top), what })
    }

    pub(super) fn label(&self, text: Option<&Text>) -> Result<Option<Label>, Fault> {
        let parse = |text: &Text| {
            Label::new(text.get_ref()).ok_or_else(|| {
                let message = format!("FAT cannot hold the name `{}`", text.get_ref().escape_debug());
                self.fault(text.span(), message).hint("eleven letters and digits at most")
            })
        };
        text.map(parse).transpose()
    }
}
