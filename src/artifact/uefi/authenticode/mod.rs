//! Authenticode: the digest of a PE image, and signatures over it in the image's certificate table.
//!
//! Signing is two steps with nothing secret in either: [`Request::new`] says which bytes are to be signed, and
//! [`Request::attach`] takes the signature. Who signs can be elsewhere (a token, another host), and comes to the same image,
//! byte for byte. "Windows Authenticode Portable Executable Signature Format" (Microsoft, 2008), UEFI 2.10 §32.2.4.

mod spc;

use cms::content_info::ContentInfo;
use cms::signed_data::SignedData;
use der::{Any, Decode, Encode, Reader, SliceReader};
use kiln_digest::{Digest, Hasher};
use x509_cert::attr::Attributes;

use super::pe::{Image, PKCS_SIGNED_DATA, PeError, REVISION};
use super::pkcs7::{self, Signed, Signer};

/// Why an image is not signed, or its signature does not count.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// The image is not one that kiln works on.
    #[error("the image cannot be signed or verified")]
    Image(#[from] PeError),
    /// No certificate table.
    #[error("the image has no signature")]
    Unsigned,
    /// A message that cannot be read.
    #[error("signature {index} of the image cannot be read")]
    Form {
        /// Its place in the table, from zero.
        index: usize,
        /// What is wrong with it.
        #[source]
        source: der::Error,
    },
    /// A message about another image.
    #[error("the image's signatures are over other bytes: it was changed after it was signed")]
    Digest,
    /// No signature by those who were asked for.
    #[error("no signature of the image is by `{signer}`")]
    Signer {
        /// Whose was looked for.
        signer: String,
    },
    /// A signature that was handed in is not one by the signer over what was to be signed.
    #[error("the signature is not by `{signer}` over this image")]
    NotOverThis {
        /// Whose it should be.
        signer: String,
    },
    /// A structure that cannot be encoded: the certificate's.
    #[error("the signature cannot be encoded")]
    Encode(#[source] der::Error),
    /// Offsets in an image have 32 bits.
    #[error("with its signature the image would be longer than 4 GiB")]
    TooLarge,
}

/// The image's SHA-256 Authenticode digest, as if padded to eight bytes, which signing does.
pub fn digest(image: &Image<'_>) -> Digest {
    let mut hasher = Hasher::default();
    let mut covered = 0;
    for range in image.covered() {
        covered = range.end;
        hasher.update(&image.bytes()[range]);
    }
    hasher.update(&[0; 8][..covered.next_multiple_of(8) - covered]);
    hasher.finish().0
}

/// What to do with signatures that an image has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// They stay, before the new one.
    Keep,
    /// They go.
    Replace,
}

/// A signature that is yet to be made.
#[derive(Debug)]
pub struct Request<'a> {
    image: &'a Image<'a>,
    signer: &'a Signer,
    content: spc::Content,
    attributes: Attributes,
    bytes: Vec<u8>,
}

impl<'a> Request<'a> {
    /// A request that `signer` sign `image`.
    ///
    /// # Errors
    /// [`SignatureError::Encode`].
    pub fn new(image: &'a Image<'a>, signer: &'a Signer) -> Result<Self, SignatureError> {
        let content = spc::Content::new(&digest(image)).map_err(SignatureError::Encode)?;
        let attributes = pkcs7::attributes(spc::INDIRECT_DATA, &Digest::of(content.octets()));
        let attributes = attributes.map_err(SignatureError::Encode)?;
        let bytes = attributes.to_der().map_err(SignatureError::Encode)?;
        Ok(Self { image, signer, content, attributes, bytes })
    }

    /// The bytes to sign, with RSASSA-PKCS1-v1_5 and SHA-256.
    pub fn to_be_signed(&self) -> &[u8] {
        &self.bytes
    }

    /// The image with `signature` in it.
    ///
    /// # Errors
    /// [`SignatureError`]: above all that the signature is not over these bytes.
    pub fn attach(self, signature: &[u8], others: Others) -> Result<Vec<u8>, SignatureError> {
        if !self.signer.has_signed(&self.bytes, signature) {
            return Err(SignatureError::NotOverThis { signer: name(self.signer) });
        }
        let data = pkcs7::message(self.signer, self.content.into_info(), Some(self.attributes), signature);
        let message = data
            .and_then(|data| {
                ContentInfo { content_type: pkcs7::SIGNED_DATA, content: Any::encode_from(&data)? }.to_der()
            })
            .map_err(SignatureError::Encode)?;
        let mut messages: Vec<&[u8]> = Vec::new();
        let present = self.image.certificates();
        if others == Others::Keep {
            messages.extend(present.iter().map(|certificate| certificate.content));
        }
        messages.push(&message);
        write(self.image, &messages)
    }
}

/// The image without its signatures.
///
/// # Errors
/// [`SignatureError::TooLarge`].
pub fn detach(image: &Image<'_>) -> Result<Vec<u8>, SignatureError> {
    write(image, &[])
}

/// The image with `messages` as its certificate table, and its CheckSum right.
fn write(image: &Image<'_>, messages: &[&[u8]]) -> Result<Vec<u8>, SignatureError> {
    let too_large = |_| SignatureError::TooLarge;
    // Where there is a signature, the padding before it is covered by it, and stays so.
    let mut bytes = image.bytes()[..image.covered()[2].end].to_vec();
    if messages.is_empty() {
        bytes.truncate(image.unsigned_end());
    } else {
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    let begin = bytes.len();
    for message in messages {
        let length = u32::try_from(message.len() + 8).map_err(too_large)?;
        bytes.extend(length.to_le_bytes());
        bytes.extend(REVISION.to_le_bytes());
        bytes.extend(PKCS_SIGNED_DATA.to_le_bytes());
        bytes.extend(*message);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    let length = u32::try_from(bytes.len() - begin).map_err(too_large)?;
    let begin = if length == 0 { 0 } else { u32::try_from(begin).map_err(too_large)? };
    u32::try_from(bytes.len()).map_err(too_large)?;
    let entry = image.places.certificate_directory;
    bytes[entry..entry + 4].copy_from_slice(&begin.to_le_bytes());
    bytes[entry + 4..entry + 8].copy_from_slice(&length.to_le_bytes());
    super::pe::set_checksum(&mut bytes, image.places.checksum);
    Ok(bytes)
}

/// Verifies that `signer` signed `image` as it is.
///
/// Other signatures are not looked at but for their digest: one over other bytes says that something was changed.
///
/// # Errors
/// [`SignatureError`].
pub fn verify(image: &Image<'_>, signer: &Signer) -> Result<(), SignatureError> {
    let certificates = image.certificates();
    if certificates.is_empty() {
        return Err(SignatureError::Unsigned);
    }
    let digest = digest(image);
    let mut verified = false;
    for (index, certificate) in certificates.iter().enumerate() {
        let form = |source| SignatureError::Form { index, source };
        let message = message(certificate.content).map_err(form)?;
        let (found, octets) = spc::digest(&message.encap_content_info).map_err(form)?;
        // A digest of another algorithm is not ours to judge; none of ours is signed that way.
        if found.as_ref().is_some_and(|found| *found != digest) {
            return Err(SignatureError::Digest);
        }
        let signed = Signed::Content(spc::INDIRECT_DATA, &octets);
        verified |= found.is_some() && pkcs7::verify(&message, &signed, signer);
    }
    if verified { Ok(()) } else { Err(SignatureError::Signer { signer: name(signer) }) }
}

/// The PKCS #7 message at the beginning of `content`, after which only zeros come.
fn message(content: &[u8]) -> der::Result<SignedData> {
    let mut reader = SliceReader::new(content)?;
    let info = ContentInfo::decode(&mut reader)?;
    let rest = reader.remaining_len();
    let rest = usize::try_from(u32::from(rest)).unwrap_or(0);
    if content[content.len() - rest..].iter().any(|byte| *byte != 0) {
        return Err(der::ErrorKind::TrailingData {
            decoded: reader.position(),
            remaining: reader.remaining_len(),
        }
        .into());
    }
    info.content_type
        .eq(&pkcs7::SIGNED_DATA)
        .then_some(())
        .ok_or(der::ErrorKind::OidUnknown { oid: info.content_type })?;
    info.content.decode_as()
}

/// What a signer is called in errors.
fn name(signer: &Signer) -> String {
    signer.certificate().tbs_certificate().subject().to_string()
}
