//! The readers of what is signed, and of what says whose signatures count: PE images and the messages in them, unified kernel
//! images and stubs, SBAT, certificates, signature lists and enrolment files.
//!
//! An input is whom it is for ([`Reader`], one byte) and what is read.

use std::collections::BTreeSet;
use std::error::Error;

use kiln_artifact::uefi::Signer;
use kiln_artifact::uefi::auth::{self, Time, Variable};
use kiln_artifact::uefi::authenticode::{self, Others, Request, SignatureError};
use kiln_artifact::uefi::esl::{self, EslError, Guid};
use kiln_artifact::uefi::pe::{Image, Section};
use kiln_artifact::uefi::sbat;
use kiln_artifact::uefi::uki::{self, Parts, Uki, UkiError};
use kiln_artifact::variables::is_signature_lists;
use kiln_digest::Digest;
use rsa::traits::PublicKeyParts as _;

use crate::driver::{Seen, Target, campaign};
use crate::places::{
    CHECKSUM, DIRECTORY, SIZE_OF_HEADERS, SIZE_OF_IMAGE, a_flipped_bit_is_seen, digest_of_all_but,
    every_byte_has_one_place, excluded, le32,
};
use crate::random::Random;
use crate::sample::{self, OPTIONAL, PE, put, section};
use crate::signer::Owner;

/// SBAT of a stub, and the whole.
const OWN: &str = "sbat,1,SBAT Version,sbat,1,https://github.com/rhboot/shim/blob/main/SBAT.md\n";
const SBAT: &str =
    "sbat,1,SBAT Version,sbat,1,https://github.com/rhboot/shim/blob/main/SBAT.md\nkiln,1,k,k,1,none\n";
/// Fields of the sample's headers, each with its width.
const FIELDS: [(usize, usize); 17] = [
    (0x3c, 4),
    (PE + 6, 2),
    (PE + 12, 4),
    (PE + 16, 4),
    (PE + 20, 2),
    (PE + 22, 2),
    (OPTIONAL + 32, 4),
    (OPTIONAL + 36, 4),
    (OPTIONAL + SIZE_OF_IMAGE, 4),
    (OPTIONAL + SIZE_OF_HEADERS, 4),
    (OPTIONAL + CHECKSUM, 4),
    (OPTIONAL + 68, 2),
    (OPTIONAL + 108, 4),
    (OPTIONAL + DIRECTORY, 4),
    (OPTIONAL + DIRECTORY + 4, 4),
    (OPTIONAL + 112 + 8 * 6, 4),
    (OPTIONAL + 112 + 8 * 6 + 4, 4),
];
/// The same of a section's.
const SECTION_FIELDS: [(usize, usize); 7] = [(8, 4), (12, 4), (16, 4), (20, 4), (24, 4), (32, 2), (36, 4)];

/// Who reads the rest of an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reader {
    /// Of images, of unified ones, and of their signatures.
    Image,
    /// The same, and then somebody signs it.
    Signing,
    /// Whoever makes a unified kernel image, here of a stub.
    Stub,
    /// Of a PKCS #7 message in a table of certificates.
    Message,
    List,
    Enrolment,
    Sbat,
    Certificate,
}

const READERS: [Reader; 8] = [
    Reader::Image,
    Reader::Signing,
    Reader::Stub,
    Reader::Message,
    Reader::List,
    Reader::Enrolment,
    Reader::Sbat,
    Reader::Certificate,
];

/// What an error says, without what differs from input to input: names, places and sizes.
fn words(error: &dyn Error) -> u64 {
    let (mut hash, mut error) = (0xcbf2_9ce4_8422_2325, Some(error));
    while let Some(cause) = error {
        let text = cause.to_string();
        let plain = |word: &&str| {
            !word.contains(['`', '-']) && !word.starts_with(|letter: char| letter.is_ascii_digit())
        };
        // FNV-1a.
        hash = text
            .split(' ')
            .filter(plain)
            .flat_map(str::bytes)
            .fold(hash, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        error = cause.source();
    }
    hash
}

/// A table of one certificate, which is `message`, behind an image of the sample's length.
fn with_message(mut image: Vec<u8>, message: &[u8]) -> Vec<u8> {
    let begin = image.len();
    image.extend(u32::try_from(message.len() + 8).expect("short").to_le_bytes());
    image.extend([0, 2, 2, 0]);
    image.extend(message);
    image.resize(image.len().next_multiple_of(8), 0);
    for (at, value) in [(0, begin), (4, image.len() - begin)] {
        let value = u32::try_from(value).expect("short");
        put(&mut image, OPTIONAL + DIRECTORY + at, &value.to_le_bytes());
    }
    image
}

/// Another image than any that was signed.
fn strange() -> Vec<u8> {
    let mut image = sample::image(false);
    image[sample::HEADERS] ^= 1;
    image
}

/// `message`, which is about the image `from`, made to be about `to` in all but its signature.
fn forged(message: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut message = message.to_vec();
    let digest = |bytes| authenticode::digest(&Image::parse(bytes).expect("an image"));
    let find = |message: &[u8], what: &Digest| message.windows(32).position(|part| part == what.as_bytes());
    let at = find(&message, &digest(from)).expect("what it is about");
    // What the attribute is over ends with the digest of the image.
    let attribute = |message: &[u8], begin: usize| find(message, &Digest::of(&message[begin..at + 32]));
    let begin = (0..at).find(|begin| attribute(&message, *begin).is_some()).expect("an attribute");
    let attribute = attribute(&message, begin).expect("found");
    put(&mut message, at, digest(to).as_bytes());
    let of_content = Digest::of(&message[begin..at + 32]);
    put(&mut message, attribute, of_content.as_bytes());
    message
}

/// What was signed of a variable: its name, the time, the list.
type Enrolled = (&'static str, Vec<u8>, Vec<u8>);

struct Readers {
    owner: Owner,
    /// A kernel for unified images.
    kernel: Vec<u8>,
    /// Good inputs, or nearly.
    seeds: Vec<(Reader, Vec<u8>)>,
    /// All images that were signed, by their digests.
    signed: BTreeSet<String>,
    enrolled: BTreeSet<Enrolled>,
}

impl Readers {
    fn parts<'a>(&'a self, sbat: Option<&'a [u8]>) -> Parts<'a> {
        Parts {
            os_release: Some(b"ID=fuzz\n"),
            release: Some("6.12"),
            command_line: "quiet",
            kernel: &self.kernel,
            initrds: &[b"one", b"another"],
            sbat,
        }
    }

    /// Images of each kind, unsigned and signed once and twice.
    fn images(&mut self) {
        let plain = sample::image(false);
        let mut symbols = [&plain[..], &[0; 18], &4_u32.to_le_bytes()].concat();
        put(&mut symbols, PE + 12, &0x800_u32.to_le_bytes());
        put(&mut symbols, PE + 16, &1_u32.to_le_bytes());
        // The last section is no multiple of anything.
        let mut short = plain[..sample::END - 3].to_vec();
        put(&mut short, section(1).start + 16, &0x1fd_u32.to_le_bytes());
        let mut revocable = plain.clone();
        put(&mut revocable, section(1).start, b".sbat\0\0\0");
        revocable[0x600..sample::END].fill(0);
        put(&mut revocable, 0x600, OWN.as_bytes());
        put(&mut revocable, section(1).start + 8, &u32::try_from(OWN.len()).expect("short").to_le_bytes());
        let unified = uki::write(&revocable, &self.parts(Some(SBAT.as_bytes()))).expect("a stub with room");
        Uki::read(&unified).expect("whole");
        for image in [plain, symbols, short, revocable, unified] {
            let once = self.owner.sign_image(&image);
            let twice = self.owner.sign_image(&once);
            self.signed.insert(authenticode::digest(&Image::parse(&once).expect("an image")).to_string());
            self.seeds.push((Reader::Signing, image.clone()));
            self.seeds.push((Reader::Signing, once.clone()));
            self.seeds.push((Reader::Stub, [&[0], &image[..]].concat()));
            self.seeds.push((Reader::Stub, [&[1], &image[..]].concat()));
            self.seeds.extend([image, once, twice].map(|image| (Reader::Image, image)));
        }
        self.seeds.push((Reader::Image, sample::image(true)));
    }

    fn others(&mut self) {
        let plain = sample::image(false);
        let signed = self.owner.sign_image(&plain);
        let message = Image::parse(&signed).expect("an image").certificates()[0].content.to_vec();
        self.seeds.push((Reader::Message, forged(&message, &plain, &strange())));
        self.seeds.push((Reader::Message, message));

        let der = self.owner.signer.der().to_vec();
        let guid = Guid::from_bytes(*b"0123456789abcdef");
        let list = esl::write(&guid, &der).expect("short");
        let small = esl::write(&guid, b"certificate").expect("short");
        // One list of two, with a header.
        let mut pair = [&small[..28], b"head", &small[28..], &small[28..]].concat();
        let bytes = u32::try_from(pair.len()).expect("short");
        for (at, value) in [(16, bytes), (20, 4)] {
            put(&mut pair, at, &value.to_le_bytes());
        }
        let lists = [list.clone(), small.clone(), [&small[..], &pair, &small].concat(), pair];
        self.seeds.extend(lists.map(|list| (Reader::List, list)));

        let time = Time { year: 2026, month: 11, day: 30, hour: 1, minute: 2, second: 3 };
        for variable in Variable::ENROLMENT {
            for list in [&list, &small] {
                let request = auth::Request::new(variable, time, list);
                let signature = self.owner.sign(request.to_be_signed());
                let file = request.attach(&self.owner.signer, &signature).expect("signed");
                self.enrolled.insert((variable.name(), file[..16].to_vec(), list.clone()));
                self.seeds.push((Reader::Enrolment, file));
            }
        }
        let padded =
            [SBAT.as_bytes(), b"other.one,23,who,what,1.2-3,https://other.example\n", &[0; 5]].concat();
        self.seeds.extend([SBAT.into(), padded].map(|text| (Reader::Sbat, text)));
        self.seeds.push((Reader::Certificate, der));
    }

    fn image(&self, bytes: &[u8], seen: &mut Seen) {
        let image = match Image::parse(bytes) {
            Ok(image) => image,
            Err(error) => return seen.note(words(&error)),
        };
        let again = Image::parse(bytes).expect("it was one");
        assert_eq!(again.sections(), image.sections());
        let symbols = every_byte_has_one_place(&image);
        let (digest, excluded) = (authenticode::digest(&image), excluded(bytes));
        assert_eq!(
            digest,
            digest_of_all_but(bytes, &excluded),
            "the digest is over all but what it excludes"
        );
        a_flipped_bit_is_seen(bytes, &digest, &excluded);
        let certificates = image.certificates().len() as u64;
        seen.note(1 << 32 | symbols << 16 | (image.sections().len() as u64) << 8 | certificates);

        let bare = authenticode::detach(&image).expect("short");
        let parsed = Image::parse(&bare).expect("without its signatures it is an image");
        assert!(parsed.certificates().is_empty());
        assert_eq!(authenticode::digest(&parsed), digest, "no signature covers itself");
        assert!(authenticode::detach(&parsed).expect("short") == bare, "none are left to be taken off");

        match authenticode::verify(&image, &self.owner.signer) {
            Ok(()) => {
                assert!(self.signed.contains(&digest.to_string()), "nobody signed it");
                seen.note(2 << 32 | certificates);
            }
            Err(error) => {
                assert_eq!(matches!(error, SignatureError::Unsigned), certificates == 0);
                seen.note(words(&error));
            }
        }
        match Uki::read(bytes) {
            Ok(uki) => {
                let names: BTreeSet<&str> =
                    image.sections().iter().map(|section| &section.name[..]).collect();
                assert_eq!(names.len(), image.sections().len(), "a name is there once");
                for name in [".linux", ".initrd", ".cmdline", ".sbat"] {
                    assert!(uki.payloads().any(|(payload, content)| payload == name && !content.is_empty()));
                }
                Image::parse(uki.section(".linux").expect("checked")).expect("a kernel that firmware starts");
                seen.note(3 << 32 | uki.payloads().count() as u64);
            }
            Err(error) => seen.note(words(&error)),
        }
    }

    fn signing(&self, bytes: &[u8], seen: &mut Seen) {
        let Ok(image) = Image::parse(bytes) else { return };
        let (signer, present) = (&self.owner.signer, image.certificates());
        let request = || Request::new(&image, signer).expect("a certificate that can be encoded");
        let signature = self.owner.sign(request().to_be_signed());
        for (others, kept) in [(Others::Keep, &present[..]), (Others::Replace, &[])] {
            let signed = request().attach(&signature, others).expect("signed by him");
            let parsed = Image::parse(&signed).expect("what is signed is an image");
            let certificates = parsed.certificates();
            let (own, before) = certificates.split_last().expect("a signature");
            assert_eq!(before, kept);
            assert_eq!(authenticode::digest(&parsed), authenticode::digest(&image));
            let verified = authenticode::verify(&parsed, signer);
            assert!(verified.is_ok() || !kept.is_empty(), "{verified:?}");
            let bare = authenticode::detach(&parsed).expect("short");
            assert!(bare == authenticode::detach(&image).expect("short"), "it comes off as it went on");
            seen.note(4 << 32 | (kept.len() as u64) << 16 | own.content.len() as u64);
        }
        let mut other = signature;
        other[0] ^= 1;
        assert!(request().attach(&other, Others::Replace).is_err(), "signed by nobody");
    }

    fn stub(&self, bytes: &[u8], seen: &mut Seen) {
        let Some((how, stub)) = bytes.split_first() else { return };
        let parts = self.parts((how & 1 == 0).then_some(SBAT.as_bytes()));
        let made = match uki::write(stub, &parts) {
            Ok(made) => made,
            Err(error) => return seen.note(words(&error)),
        };
        assert!(uki::write(stub, &parts).expect("a stub with room") == made, "equal parts give equal bytes");
        let stub = Image::parse(stub).expect("something was made of it");
        let unified = Image::parse(&made).expect("what was made is an image");
        let stays = |section: &&Section| parts.sbat.is_none() || section.name != ".sbat";
        let shown = |image: &Image<'_>, section: &Section| {
            let Section { name, virtual_address, virtual_size_bytes, characteristics, .. } = section.clone();
            (name, virtual_address, virtual_size_bytes, characteristics, image.content(section).to_vec())
        };
        let own = stub.sections().iter().filter(stays).map(|section| shown(&stub, section));
        let after = unified.sections().iter().filter(stays).map(|section| shown(&unified, section));
        assert!(own.eq(after.take(stub.sections().iter().filter(stays).count())), "the stub stays as it is");
        let times = |name: &str| stub.sections().iter().filter(|section| section.name == name).count();
        match Uki::read(&made) {
            Ok(uki) => {
                let contents = [
                    (".osrel", parts.os_release),
                    (".uname", parts.release.map(str::as_bytes)),
                    (".cmdline", Some(parts.command_line.as_bytes())),
                    (".linux", Some(parts.kernel)),
                    (".initrd", Some(b"one\0another")),
                ];
                for (name, content) in contents {
                    assert_eq!(uki.section(name), content, "{name}");
                }
                let sbat = sbat::check(uki.section(".sbat").expect("one")).expect("checked");
                let added =
                    |text: &[u8]| String::from_utf8_lossy(text).lines().all(|line| sbat.contains(line));
                assert!(parts.sbat.is_none_or(added));
                seen.note(5 << 32 | uki.image().sections().len() as u64);
            }
            // What the stub itself has that no image may have that is signed.
            Err(UkiError::Twice(name)) => assert!(times(&name) > 1, "{name}"),
            Err(UkiError::Part { .. }) => {
                let open = |section: &Section| {
                    section.name == ".sbat" && section.virtual_size_bytes as usize > section.file.len()
                };
                assert!(stub.sections().iter().any(open), "every part is whole");
            }
            Err(error) => unreachable!("what was made is no unified image: {error:?}"),
        }
    }

    fn message(&self, bytes: &[u8], seen: &mut Seen) {
        if bytes.is_empty() {
            return;
        }
        let verdict = |bytes: &[u8]| {
            let image = Image::parse(bytes).expect("an image with a message");
            authenticode::verify(&image, &self.owner.signer)
        };
        match verdict(&with_message(sample::image(false), bytes)) {
            Ok(()) => seen.note(6 << 32),
            Err(error) => seen.note(words(&error)),
        }
        let error = verdict(&with_message(strange(), bytes)).expect_err("nobody signed this image");
        seen.note(words(&error));
    }

    fn enrolment(&self, bytes: &[u8], seen: &mut Seen) {
        for variable in Variable::ENROLMENT {
            match auth::verify(variable, bytes, &self.owner.signer) {
                Ok(list) => {
                    assert!(bytes.ends_with(list));
                    let enrolled = (variable.name(), bytes[..16].to_vec(), list.to_vec());
                    assert!(self.enrolled.contains(&enrolled), "nobody signed this list for {variable:?}");
                    seen.note(7 << 32 | variable as u64);
                }
                Err(error) => seen.note(words(&error)),
            }
        }
    }

    fn certificate(&self, bytes: &[u8], seen: &mut Seen) {
        let signer = match Signer::from_der(bytes) {
            Ok(signer) => signer,
            Err(error) => return seen.note(words(&error)),
        };
        assert_eq!(signer.der(), bytes);
        assert!(signer.key().n().bit_width() >= 2048);
        let own = self.owner.signer.key();
        let signed = &self.seeds.iter().find(|(reader, image)| {
            *reader == Reader::Image && Image::parse(image).is_ok_and(|image| image.certificates().len() == 1)
        });
        let image = Image::parse(&signed.expect("one").1).expect("an image");
        let verified = authenticode::verify(&image, &signer);
        assert!(verified.is_err() || signer.key() == own, "by another key");
        seen.note(8 << 32 | u64::from(verified.is_ok()));
    }
}

fn list(bytes: &[u8], seen: &mut Seen) {
    let read = esl::read(bytes);
    match &read {
        Ok(certificates) => {
            assert_eq!(is_signature_lists(bytes), !certificates.is_empty());
            let write = |(owner, der): &(Guid, &[u8])| esl::write(owner, der).expect("short");
            let again: Vec<u8> = certificates.iter().flat_map(write).collect();
            assert_eq!(esl::read(&again), read, "the certificates are the same, and who answers for each");
            let (mut rest, mut plain) = (bytes, true);
            while !rest.is_empty() {
                let length = le32(rest, 16);
                plain &= le32(rest, 20) == 0 && le32(rest, 24) + 28 == length;
                rest = &rest[length..];
            }
            assert_eq!(again == bytes, plain, "lists of one certificate each are written as they were");
            seen.note(9 << 32 | u64::from(plain) << 16 | certificates.len() as u64);
        }
        Err(EslError::Sizes) => assert!(!is_signature_lists(bytes), "two readers differ"),
        Err(error) => seen.note(words(error)),
    }
}

fn revocations(bytes: &[u8], seen: &mut Seen) {
    let text = match sbat::check(bytes) {
        Ok(text) => text,
        Err(error) => return seen.note(words(&error)),
    };
    let (begin, rest) = bytes.split_at(text.len());
    assert!(begin == text.as_bytes() && rest.iter().all(|byte| *byte == 0));
    assert_eq!(sbat::merge(bytes, bytes).as_deref(), Ok(text), "nothing is new in it");
    for line in text.lines() {
        let fields: Vec<&str> = line.split(',').collect();
        let is_number = fields[1].bytes().all(|byte| byte.is_ascii_digit()) && fields[1].parse() != Ok(0_u32);
        assert!(fields.len() == 6 && is_number, "{line}");
    }
    match sbat::merge(SBAT.as_bytes(), bytes) {
        Ok(merged) => {
            assert_eq!(sbat::check(merged.as_bytes()), Ok(&merged[..]));
            let lines: BTreeSet<&str> = merged.lines().collect();
            assert_eq!(lines, SBAT.lines().chain(text.lines()).collect(), "all lines of both");
            let components: BTreeSet<_> = lines.iter().map(|line| line.split(',').next()).collect();
            assert_eq!(components.len(), merged.lines().count(), "one line for each component");
            seen.note(10 << 32 | lines.len() as u64);
        }
        Err(error) => seen.note(words(&error)),
    }
}

/// Puts into a field of an image what is in another, what is near, or what is often wrong.
fn change_field(random: &mut Random, image: &mut Vec<u8>) {
    let pick = |random: &mut Random| {
        if random.once_in(2) {
            return random.pick(&FIELDS);
        }
        let (at, width) = random.pick(&SECTION_FIELDS);
        (section(random.below(10)).start + at, width)
    };
    let get = |image: &[u8], (at, width): (usize, usize)| {
        let bytes = image.get(at..at + width)?;
        Some(bytes.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte)))
    };
    if random.once_in(8) {
        let name = random.pick(&[b".sbat\0\0\0", b".linux\0\0", b".initrd\0", b".cmdline", b".data\0\0\0"]);
        let at = section(random.below(10)).start;
        if at + name.len() <= image.len() {
            put(image, at, name);
        }
        return;
    }
    if random.once_in(8) {
        let more = 1 + random.below(16);
        image.resize(image.len() + more, 0);
        return;
    }
    let to = pick(random);
    let Some(old) = get(image, to) else { return };
    let step = random.pick(&[1, 4, 8, 0x20, 0x200, 0x1000]);
    let value = match random.below(4) {
        0 => random.edge(),
        1 => get(image, pick(random)).unwrap_or(0),
        2 if random.once_in(2) => old.wrapping_add(step),
        2 => old.wrapping_sub(step),
        _ => step * (random.u64() % 16),
    };
    put(image, to.0, &value.to_le_bytes()[..to.1]);
}

impl Target for Readers {
    const NAME: &'static str = "pe";
    const MOST_BYTES: usize = 12 << 10;

    fn new() -> Self {
        let mut readers = Self {
            owner: Owner::new(),
            kernel: sample::image(false),
            seeds: Vec::new(),
            signed: BTreeSet::new(),
            enrolled: BTreeSet::new(),
        };
        readers.images();
        readers.others();
        readers
    }

    fn generate(&mut self, random: &mut Random, input: &mut Vec<u8>) {
        let reader = match random.below(16) {
            // A signature takes a hundred times as long as anything else.
            _ if random.once_in(2048) => Reader::Signing,
            0..=6 => Reader::Image,
            7 | 8 => Reader::Stub,
            9 | 10 => Reader::Message,
            11 | 12 => Reader::List,
            13 => Reader::Enrolment,
            14 => Reader::Sbat,
            _ => Reader::Certificate,
        };
        let fitting = self.seeds.iter().filter(|(of, _)| *of == reader);
        let index = random.below(fitting.clone().count());
        let mut bytes = fitting.clone().nth(index).expect("below their count").1.clone();
        let choice = bytes.first().copied().filter(|_| reader == Reader::Stub);
        if choice.is_some() {
            bytes.remove(0);
        }
        if matches!(reader, Reader::Image | Reader::Signing | Reader::Stub) {
            for _ in 0..random.below(4) {
                change_field(random, &mut bytes);
            }
        }
        input.push(reader as u8);
        input.extend(choice);
        input.extend(bytes);
    }

    fn parts(input: &[u8]) -> Vec<usize> {
        // Whom it is for, and then in the steps of the sample's FileAlignment.
        (1..input.len()).step_by(0x200).chain([input.len()]).collect()
    }

    fn run(&mut self, input: &[u8], seen: &mut Seen) {
        let Some((reader, bytes)) = input.split_first() else { return };
        match READERS[usize::from(*reader) % READERS.len()] {
            Reader::Image => self.image(bytes, seen),
            Reader::Signing => self.signing(bytes, seen),
            Reader::Stub => self.stub(bytes, seen),
            Reader::Message => self.message(bytes, seen),
            Reader::List => list(bytes, seen),
            Reader::Enrolment => self.enrolment(bytes, seen),
            Reader::Sbat => revocations(bytes, seen),
            Reader::Certificate => self.certificate(bytes, seen),
        }
    }

    fn memory_limit(input_bytes: usize) -> usize {
        // A few copies of an image, and a message's parts, of which each is some ten times as long as its shortest encoding.
        32 * input_bytes + (1 << 20)
    }
}

#[test]
fn no_bytes_pass_for_what_was_signed_or_break_who_reads_them() {
    campaign::<Readers>();
}
