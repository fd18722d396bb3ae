//! What a step makes on the host, as `kiln.toml` says it: artifacts of trees and files, in kiln's own formats.

use std::fmt;

use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use toml::Spanned;

use super::Text;

/// One thing that a step makes: exactly one of squashfs, erofs, cpio, fat, files, verity, uki and record says what, and where in
/// WORK. A `*` in that path stands for what the first `*` in a path of `each`, `linux` or `from` matches, and one is made
/// for each match; everywhere else `*` is then the same text.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct MakeTable {
    /// A squashfs image of `from`.
    #[schemars(with = "Option<String>")]
    pub squashfs: Option<Text>,
    /// An uncompressed erofs image of `from`.
    #[schemars(with = "Option<String>")]
    pub erofs: Option<Text>,
    /// A cpio archive (newc) of `from`, as kernels unpack at boot.
    #[schemars(with = "Option<String>")]
    pub cpio: Option<Text>,
    /// A FAT32 image of `from`.
    #[schemars(with = "Option<String>")]
    pub fat: Option<Text>,
    /// The files of `from` themselves, below this folder; `.` is WORK.
    #[schemars(with = "Option<String>")]
    pub files: Option<Text>,
    /// A dm-verity hash tree of the one file that `from` names.
    #[schemars(with = "Option<String>")]
    pub verity: Option<Text>,
    /// A unified kernel image of stub, linux, initrd, cmdline, osrel, uname and sbat.
    #[schemars(with = "Option<String>")]
    pub uki: Option<Text>,
    /// The record by which `kiln sign` assembles and signs images of stub, linux, initrd, cmdline, osrel and sbat, one for each
    /// match, all of them files in WORK; `uname` is their release.
    #[schemars(with = "Option<String>")]
    pub record: Option<Text>,
    /// Of a record: where each signed image goes in WORK. Several makes of one step may add to one record.
    #[schemars(with = "Vec<String>")]
    pub signed: Vec<Text>,
    /// Of a record: a file in WORK with the release of the kernel that `signed` paths without `*` are for, where there are
    /// several kernels.
    #[schemars(with = "Option<String>")]
    pub default: Option<Text>,
    /// Of a record: images that the initrd opens through verity, each with PATH.verity and a file of its root hash beside it;
    /// `?` behind a path that need not be there.
    #[schemars(with = "Vec<String>")]
    pub images: Vec<Text>,
    /// What goes into it; a later one lies above an earlier.
    pub from: Vec<FromTable>,
    /// What `*` ranges over, where no path of `from` or `linux` has one.
    pub each: Option<FromTable>,
    /// Make nothing where nothing matches.
    pub optional: bool,
    /// `gzip`, `zstd`, `lz4`, `xz` or `none`, with a level behind a colon: `zstd:19`.
    #[schemars(with = "Option<String>")]
    pub compression: Option<Text>,
    /// Block size of a squashfs image: 4K to 1M, 128K unless said.
    #[schemars(with = "Option<String>")]
    pub block: Option<Text>,
    /// Name of a FAT volume.
    #[schemars(with = "Option<String>")]
    pub label: Option<Text>,
    /// Length of a FAT image; as short as can be unless said.
    #[schemars(with = "Option<String>")]
    pub size: Option<Text>,
    /// Of verity: where the root hash goes, as 64 hexadecimal digits.
    #[schemars(with = "Option<String>")]
    pub hash: Option<Text>,
    /// Of a unified kernel image: the stub that starts it.
    pub stub: Option<FromTable>,
    /// Its kernel.
    pub linux: Option<FromTable>,
    /// The archives that are its initrd, in this order.
    pub initrd: Vec<FromTable>,
    /// Its command line.
    pub cmdline: Option<FromTable>,
    /// os-release(5) of what it boots.
    pub osrel: Option<FromTable>,
    /// The kernel's release.
    #[schemars(with = "Option<String>")]
    pub uname: Option<Text>,
    /// Lines of SBAT to add to the stub's.
    pub sbat: Option<FromTable>,
}

impl MakeTable {
    /// Every text in it, to be filled in.
    pub(super) fn texts(&mut self) -> impl Iterator<Item = &mut Text> {
        let own = [
            &mut self.squashfs,
            &mut self.erofs,
            &mut self.cpio,
            &mut self.fat,
            &mut self.files,
            &mut self.verity,
            &mut self.uki,
            &mut self.record,
            &mut self.default,
            &mut self.compression,
            &mut self.block,
            &mut self.label,
            &mut self.size,
            &mut self.hash,
            &mut self.uname,
        ];
        let parts = [
            &mut self.each,
            &mut self.stub,
            &mut self.linux,
            &mut self.cmdline,
            &mut self.osrel,
            &mut self.sbat,
        ];
        let parts = parts.into_iter().flatten().chain(&mut self.from).chain(&mut self.initrd);
        let lists = self.signed.iter_mut().chain(&mut self.images);
        own.into_iter().flatten().chain(lists).chain(parts.flat_map(|part| part.says.texts()))
    }
}

impl FromKeys {
    fn texts(&mut self) -> impl Iterator<Item = &mut Text> {
        let own = [
            &mut self.work,
            &mut self.src,
            &mut self.root,
            &mut self.kiln,
            &mut self.text,
            &mut self.path,
            &mut self.at,
            &mut self.mode,
        ];
        let lists = [&mut self.only, &mut self.exclude, &mut self.modules];
        own.into_iter().flatten().chain(lists.into_iter().flatten())
    }
}

/// Where something comes from: exactly one of work, src, root, kiln and text. A plain text is a path in WORK.
#[derive(Debug, Clone, Default)]
pub struct FromTable {
    /// Where in the recipe it stands; nothing where that is not known.
    pub span: std::ops::Range<usize>,
    /// What it says.
    pub says: FromKeys,
}

/// What a [`FromTable`] says.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct FromKeys {
    /// A file or folder in WORK, put out by a step that this one needs, or made before in this one.
    #[schemars(with = "Option<String>")]
    pub work: Option<Text>,
    /// A file or folder in SRCDIR.
    #[schemars(with = "Option<String>")]
    pub src: Option<Text>,
    /// A root of the recipe by name, or a root as `--root` takes it.
    #[schemars(with = "Option<String>")]
    pub root: Option<Text>,
    /// A program that comes with kiln: `init` of initOS's initrd, `initos-init` of its root, or `agent`.
    #[schemars(with = "Option<String>")]
    pub kiln: Option<Text>,
    /// A file of this text.
    #[schemars(with = "Option<String>")]
    pub text: Option<Text>,
    /// Of a root: a file or folder in it; all of it unless said.
    #[schemars(with = "Option<String>")]
    pub path: Option<Text>,
    /// Where it goes: a folder's content into this folder, a file to this path. The top, and the file's own name, unless
    /// said.
    #[schemars(with = "Option<String>")]
    pub at: Option<Text>,
    /// Globs of what is taken of a folder; a folder that matches is taken whole. All of it unless said.
    #[schemars(with = "Vec<String>")]
    pub only: Vec<Text>,
    /// Globs of what is left out. `boot/*` leaves the folder.
    #[schemars(with = "Vec<String>")]
    pub exclude: Vec<Text>,
    /// Permission bits of a file, as text: "755".
    #[schemars(with = "Option<String>")]
    pub mode: Option<Text>,
    /// All files that are taken, one behind the other in the order of their paths, as one file at `at`.
    pub join: bool,
    /// Nothing, where there is none.
    pub optional: bool,
    /// Of a folder of kernel modules: only those named here and all they need, `?` behind those that a kernel need not have;
    /// `profile:cloud` and `profile:host` are what initOS's initrd loads in virtual machines, and on any host.
    #[schemars(with = "Vec<String>")]
    pub modules: Vec<Text>,
}

impl<'de> Deserialize<'de> for FromTable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = FromKeys;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a path in WORK, or a table with work, src, root, kiln or text")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<FromKeys, E> {
                Ok(FromKeys { work: Some(Spanned::new(0..0, text.to_owned())), ..FromKeys::default() })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<FromKeys, A::Error> {
                FromKeys::deserialize(MapAccessDeserializer::new(map))
            }
        }
        struct Keys(FromKeys);
        impl<'de> Deserialize<'de> for Keys {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(Either).map(Keys)
            }
        }
        let spanned = Spanned::<Keys>::deserialize(deserializer)?;
        let span = spanned.span();
        let Keys(mut says) = spanned.into_inner();
        if let Some(work) = says.work.take() {
            let span = if work.span().is_empty() { span.clone() } else { work.span() };
            says.work = Some(Spanned::new(span, work.into_inner()));
        }
        Ok(Self { span, says })
    }
}

impl JsonSchema for FromTable {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "FromTable".into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let table = generator.subschema_for::<FromKeys>();
        schemars::json_schema!({
            "description": "Where something comes from: exactly one of work, src, root, kiln and text. A plain text is a path in WORK.",
            "anyOf": [{ "type": "string" }, table]
        })
    }
}

/// One or a list of them.
#[derive(Debug, Clone)]
pub struct Several<T>(pub Vec<T>);

impl<T> Default for Several<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Several<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Either<T> {
            type Value = Several<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("one, or a list of them")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(|one| Several(vec![one]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut all = Vec::new();
                while let Some(one) = list.next_element()? {
                    all.push(one);
                }
                Ok(Several(all))
            }
        }
        deserializer.deserialize_any(Either(std::marker::PhantomData))
    }
}

impl<T: JsonSchema> JsonSchema for Several<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        format!("Several_{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let one = generator.subschema_for::<T>();
        schemars::json_schema!({ "anyOf": [one, { "type": "array", "items": one }] })
    }
}
