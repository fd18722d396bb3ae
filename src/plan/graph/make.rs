//! From the tables of what a step makes to [`Make`]s: origins, patterns, codecs and sizes read.

use std::ops::Range;

use kiln_artifact::cpio::Encoding;
use kiln_artifact::squashfs::Codec;

use super::reader::Reader;
use crate::plan::make::{From, Make, Origin, Pattern, Recorded, Unified, What};
use crate::plan::recipe::{Expanded, Fault, FromTable, MakeTable, Text};
use crate::plan::{Outputs, RootSpec, parse_bytes};

/// Programs that come with kiln.
const PROGRAMS: [&str; 3] = ["init", "initos-init", "agent"];
/// The block size of squashfs images, as mksquashfs has it.
const BLOCK_BYTES: u32 = 128 << 10;

/// The name of a compression, its level where one is said, and where both stand.
type Compression<'a> = (&'a str, Option<u32>, &'a Text);

impl Reader<'_> {
    /// What `step` makes.
    pub fn makes(&self, step: &Expanded<'_>) -> Result<Vec<Make>, Fault> {
        step.table.make.0.iter().map(|table| self.make(step, table)).collect()
    }

    fn make(&self, step: &Expanded<'_>, table: &MakeTable) -> Result<Make, Fault> {
        let named = [
            ("squashfs", &table.squashfs),
            ("erofs", &table.erofs),
            ("cpio", &table.cpio),
            ("fat", &table.fat),
            ("files", &table.files),
            ("verity", &table.verity),
            ("uki", &table.uki),
            ("record", &table.record),
        ];
        let mut given = named.iter().filter_map(|(name, path)| path.as_ref().map(|path| (*name, path)));
        let (name, path) = given.next().ok_or_else(|| {
            let message = format!("step `{}` does not say what it makes", step.name);
            let hint =
                "one of squashfs, erofs, cpio, fat, files, verity, uki and record says what, and where";
            self.fault(step.span.clone(), message).hint(hint)
        })?;
        if let Some((other, span)) = given.next().map(|(other, path)| (other, path.span())) {
            let message = format!("one thing is not both {name} and {other}");
            return Err(self.fault(span, message).hint("make is a list: make = [{ … }, { … }]"));
        }
        let span = path.span();
        let path = self.pattern(path)?;
        if path.text().is_empty() && name != "files" {
            return Err(self.fault(span, format!("{name} takes the path of a file")));
        }
        self.check_keys(name, table, &span)?;
        let from = table.from.iter().map(|from| self.from(step, from)).collect::<Result<Vec<_>, _>>()?;
        let what = self.what(step, name, table, &span)?;
        let is_unified = matches!(what, What::Unified(_) | What::Record(_));
        if from.is_empty() != is_unified || (from.len() != 1 && matches!(what, What::Verity { .. })) {
            let message = match name {
                "uki" | "record" => {
                    "a unified kernel image takes stub, linux, initrd and cmdline, and no from".to_owned()
                }
                "verity" => "verity takes the one file that from names".to_owned(),
                _ => format!("nothing says what goes into `{}`", path.text()),
            };
            return Err(self.fault(span, message).hint("from = [\"PATH\", { root = \"NAME\" }]"));
        }
        let each = table.each.as_ref().map(|each| self.from(step, each)).transpose()?;
        let make = Make { what, path, from, each, optional: table.optional };
        let is_starred = make.globs().iter().any(|glob| glob.contains('*') && glob != "**");
        let stars = make.path.has_star() || make.each.is_some();
        if is_starred && stars && make.range().is_none() {
            let message = format!("nothing says what `*` in `{}` ranges over", make.path.text());
            return Err(self.fault(span, message).hint("a path of from, linux or each has one too"));
        }
        Ok(make)
    }

    /// Refuses keys that belong to another kind.
    fn check_keys(&self, name: &str, table: &MakeTable, span: &Range<usize>) -> Result<(), Fault> {
        let unified = ["uki", "record"];
        let keys: [(&str, bool, &[&str]); 14] = [
            ("default", table.default.is_some(), &["record"]),
            ("signed", !table.signed.is_empty(), &["record"]),
            ("images", !table.images.is_empty(), &["record"]),
            ("compression", table.compression.is_some(), &["squashfs", "cpio"]),
            ("block", table.block.is_some(), &["squashfs"]),
            ("label", table.label.is_some(), &["fat"]),
            ("size", table.size.is_some(), &["fat"]),
            ("hash", table.hash.is_some(), &["verity"]),
            ("stub", table.stub.is_some(), &unified),
            ("linux", table.linux.is_some(), &unified),
            ("initrd", !table.initrd.is_empty(), &unified),
            ("cmdline", table.cmdline.is_some(), &unified),
            ("osrel", table.osrel.is_some(), &unified),
            ("uname", table.uname.is_some(), &unified),
        ];
        match keys.iter().find(|(_, is_given, kinds)| *is_given && !kinds.contains(&name)) {
            Some((key, _, kinds)) => Err(self
                .fault(span.clone(), format!("`{key}` belongs to {}, not to {name}", kinds.join(" and ")))),
            None => Ok(()),
        }
    }

    fn what(
        &self,
        step: &Expanded<'_>,
        name: &str,
        table: &MakeTable,
        span: &Range<usize>,
    ) -> Result<What, Fault> {
        Ok(match name {
            "squashfs" => What::Squashfs { codec: self.codec(table)?, block_bytes: self.block(table)? },
            "erofs" => What::Erofs,
            "cpio" => What::Cpio(self.encoding(table)?),
            "fat" => What::Fat {
                label: self.label(table.label.as_ref())?,
                size_bytes: self.bytes(table.size.as_ref())?,
            },
            "files" => What::Files,
            "verity" => {
                What::Verity { hash: table.hash.as_ref().map(|hash| self.pattern(hash)).transpose()? }
            }
            "record" => What::Record(Box::new(self.recorded(step, table, span)?)),
            _ => What::Unified(Box::new(self.unified(step, table, span)?)),
        })
    }

    fn unified(&self, step: &Expanded<'_>, table: &MakeTable, span: &Range<usize>) -> Result<Unified, Fault> {
        let part = |name: &str, from: &Option<FromTable>| match from {
            Some(from) => self.from(step, from),
            None => Err(self.fault(span.clone(), format!("a unified kernel image takes {name}"))),
        };
        let some = |from: &Option<FromTable>| from.as_ref().map(|from| self.from(step, from)).transpose();
        if table.initrd.is_empty() {
            let hint = "firmware or a boot menu could choose another, which no signature covers";
            return Err(self
                .fault(span.clone(), "a unified kernel image takes initrd".to_owned())
                .hint(hint));
        }
        Ok(Unified {
            stub: part("stub", &table.stub)?,
            linux: part("linux", &table.linux)?,
            initrds: table.initrd.iter().map(|from| self.from(step, from)).collect::<Result<_, _>>()?,
            command_line: part("cmdline", &table.cmdline)?,
            os_release: some(&table.osrel)?,
            release: table.uname.as_ref().map(|text| text.get_ref().clone()),
            sbat: some(&table.sbat)?,
        })
    }

    fn recorded(
        &self,
        step: &Expanded<'_>,
        table: &MakeTable,
        span: &Range<usize>,
    ) -> Result<Recorded, Fault> {
        let parts = self.unified(step, table, span)?;
        let all = [&parts.stub, &parts.linux, &parts.command_line].into_iter();
        let all = all.chain(&parts.initrds).chain(&parts.os_release).chain(&parts.sbat);
        let is_in_work = |from: &From| matches!(from.origin, Origin::Work(_));
        if !all.into_iter().all(is_in_work) || parts.os_release.is_none() || parts.release.is_none() {
            let message =
                "a record names files in WORK: stub, linux, initrd, cmdline and osrel, and uname".to_owned();
            let hint = "{ files = \"boot\", from = […] } puts a file of a root or a text there first";
            return Err(self.fault(span.clone(), message).hint(hint));
        }
        if table.signed.is_empty() {
            let message = "nothing says where signed images go".to_owned();
            return Err(self
                .fault(span.clone(), message)
                .hint("signed = [\"boot/efi/EFI/BOOT/BOOTX64.EFI\"]"));
        }
        let image = |text: &Text| {
            let (path, may_lack) = match text.get_ref().strip_suffix('?') {
                Some(path) => (path, true),
                None => (text.get_ref().as_str(), false),
            };
            Ok((self.pattern(&Text::new(text.span(), path.to_owned()))?, may_lack))
        };
        Ok(Recorded {
            parts,
            signed: table.signed.iter().map(|path| self.pattern(path)).collect::<Result<_, _>>()?,
            default: table.default.as_ref().map(|path| self.pattern(path)).transpose()?,
            images: table.images.iter().map(image).collect::<Result<_, _>>()?,
        })
    }

    pub(super) fn pattern(&self, text: &Text) -> Result<Pattern, Fault> {
        let wrong = |error| self.fault(text.span(), format!("`{}` {error}", text.get_ref().escape_debug()));
        Pattern::parse(text.get_ref()).map_err(wrong)
    }

    fn from(&self, step: &Expanded<'_>, table: &FromTable) -> Result<From, Fault> {
        let says = &table.says;
        let span = || if table.span.is_empty() { step.span.clone() } else { table.span.clone() };
        let fault = |message: &str| self.fault(span(), message.to_owned());
        let origins = [
            says.work.as_ref().map(|path| Ok(Origin::Work(self.pattern(path)?))),
            says.src.as_ref().map(|path| Ok(Origin::Source(self.pattern(path)?))),
            says.root.as_ref().map(|name| {
                let path = says.path.as_ref().map(|path| self.pattern(path)).transpose()?;
                Ok(Origin::Root { spec: self.root_named(name)?, path: path.unwrap_or_else(Pattern::top) })
            }),
            says.kiln.as_ref().map(|name| match PROGRAMS.contains(&name.get_ref().as_str()) {
                true => Ok(Origin::Program(name.get_ref().clone())),
                false => {
                    Err(self.unknown(name, "program that comes with kiln, called", PROGRAMS.into_iter()))
                }
            }),
            says.text.as_ref().map(|text| Ok(Origin::Text(text.get_ref().clone()))),
        ];
        let mut origins = origins.into_iter().flatten();
        let origin = match (origins.next(), origins.next()) {
            (Some(origin), None) => origin?,
            (None, _) => {
                return Err(fault("one of work, src, root, kiln and text says where this comes from"));
            }
            (Some(_), Some(_)) => return Err(fault("this comes from one of work, src, root, kiln and text")),
        };
        if says.path.is_some() && !matches!(origin, Origin::Root { .. }) {
            return Err(fault("`path` belongs to a root").hint("work and src take the path themselves"));
        }
        let mode = says.mode.as_ref().map(|mode| {
            u16::from_str_radix(mode.get_ref(), 8).ok().filter(|bits| *bits <= 0o7777).ok_or_else(|| {
                self.fault(mode.span(), "permission bits are octal digits, such as 755".to_owned())
            })
        });
        let at = says.at.as_ref().map(|at| self.pattern(at)).transpose()?;
        if says.join && at.is_none() {
            return Err(fault("files that are joined need a place: at = \"PATH\""));
        }
        Ok(From {
            origin,
            at,
            only: self.globs(&says.only)?,
            exclude: self.globs(&says.exclude)?,
            mode: mode.transpose()?,
            join: says.join,
            optional: says.optional,
            modules: says.modules.iter().map(|name| name.get_ref().clone()).collect(),
        })
    }

    /// The root that `name` names or is.
    pub fn root_named(&self, name: &Text) -> Result<RootSpec, Fault> {
        if name.get_ref().contains(':') {
            return self.root_spec(name.get_ref(), name.span());
        }
        match self.recipe.roots.get(name.get_ref().as_str()) {
            Some(table) => self.named_root(table),
            None => {
                let known = self.recipe.roots.keys().map(|name| name.get_ref().as_str());
                Err(self.unknown(name, "root", known))
            }
        }
    }

    /// A compression's name, and its level where one is said.
    fn compression<'a>(&self, table: &'a MakeTable) -> Result<Option<Compression<'a>>, Fault> {
        let Some(text) = &table.compression else { return Ok(None) };
        let (name, level) = match text.get_ref().split_once(':') {
            None => (text.get_ref().as_str(), None),
            Some((name, level)) => {
                let wrong = || self.fault(text.span(), format!("`{level}` is no level of a compression"));
                (name, Some(level.parse().map_err(|_| wrong())?))
            }
        };
        Ok(Some((name, level, text)))
    }

    fn codec(&self, table: &MakeTable) -> Result<Codec, Fault> {
        let Some((name, level, text)) = self.compression(table)? else { return Ok(Codec::Gzip { level: 9 }) };
        let codec = match (name, level) {
            ("gzip", level @ (None | Some(1..=9))) => Codec::Gzip { level: level.unwrap_or(9) },
            ("zstd", level @ (None | Some(1..=22))) => {
                Codec::Zstd { level: level.and_then(|level| i32::try_from(level).ok()).unwrap_or(15) }
            }
            ("lz4", None) => Codec::Lz4,
            ("xz", level @ (None | Some(0..=9))) => Codec::Xz { level: level.unwrap_or(6) },
            _ => {
                let message = format!("squashfs has no compression `{}`", text.get_ref());
                let hint = "gzip, zstd, lz4 or xz; gzip:1 to gzip:9, zstd:1 to zstd:22, xz:0 to xz:9";
                return Err(self.fault(text.span(), message).hint(hint));
            }
        };
        Ok(codec)
    }

    fn encoding(&self, table: &MakeTable) -> Result<Encoding, Fault> {
        let Some((name, level, text)) = self.compression(table)? else { return Ok(Encoding::Plain) };
        match (name, level) {
            ("none", None) => Ok(Encoding::Plain),
            ("gzip", level @ (None | Some(0..=9))) => Ok(Encoding::Gzip { level: level.unwrap_or(6) }),
            ("zstd", level @ (None | Some(1..=19))) => {
                Ok(Encoding::Zstd { level: level.and_then(|level| i32::try_from(level).ok()).unwrap_or(9) })
            }
            _ => {
                let message = format!("an initrd has no compression `{}`", text.get_ref());
                let hint = "none, gzip or zstd; gzip:0 to gzip:9, zstd:1 to zstd:19";
                Err(self.fault(text.span(), message).hint(hint))
            }
        }
    }

    fn block(&self, table: &MakeTable) -> Result<u32, Fault> {
        let Some(text) = &table.block else { return Ok(BLOCK_BYTES) };
        let bytes = self.bytes(Some(text))?.and_then(|bytes| u32::try_from(bytes).ok());
        let bytes = bytes.filter(|bytes| bytes.is_power_of_two() && (4096..=1 << 20).contains(bytes));
        bytes.ok_or_else(|| {
            self.fault(text.span(), "a block of squashfs is a power of two from 4K to 1M".to_owned())
        })
    }

    fn bytes(&self, text: Option<&Text>) -> Result<Option<u64>, Fault> {
        let parse = |text: &Text| {
            parse_bytes(text.get_ref()).map_err(|error| self.fault(text.span(), error.to_string()))
        };
        text.map(parse).transpose()
    }

    /// The outputs of makes.
    pub fn made(&self, makes: &[Make], span: Range<usize>) -> Result<Outputs, Fault> {
        let globs: Vec<String> = makes.iter().flat_map(Make::globs).collect();
        Outputs::parse(globs.iter().map(String::as_str)).map_err(|error| self.fault(span, error.to_string()))
    }
}
