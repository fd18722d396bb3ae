//! SpcIndirectDataContent: what an Authenticode signature signs, which is a digest and what it is a digest of.

use cms::signed_data::EncapsulatedContentInfo;
use der::asn1::{ObjectIdentifier, OctetString};
use der::{Any, Sequence, ValueOrd};
use kiln_digest::Digest;
use x509_cert::spki::AlgorithmIdentifierOwned;

use crate::uefi::pkcs7;

/// SPC_INDIRECT_DATA_OBJID.
pub(super) const INDIRECT_DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.311.2.1.4");
/// SPC_PE_IMAGE_DATAOBJ.
const PE_IMAGE_DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.311.2.1.15");

/// SpcPeImageData with no flags and, as its link to the file, the word that the specification sets for all: a BIT STRING,
/// and in it `[0] { [2] { [0] "<<<Obsolete>>>" } }` as a BMPString.
const IMAGE_DATA: [u8; 39] = [
    0x30, 0x25, 0x03, 0x01, 0x00, 0xa0, 0x20, 0xa2, 0x1e, 0x80, 0x1c, 0x00, b'<', 0x00, b'<', 0x00, b'<',
    0x00, b'O', 0x00, b'b', 0x00, b's', 0x00, b'o', 0x00, b'l', 0x00, b'e', 0x00, b't', 0x00, b'e', 0x00,
    b'>', 0x00, b'>', 0x00, b'>',
];

#[derive(Clone, Debug, Eq, PartialEq, Sequence, ValueOrd)]
struct IndirectData {
    data: AttributeTypeAndOptionalValue,
    digest: DigestInfo,
}

#[derive(Clone, Debug, Eq, PartialEq, Sequence, ValueOrd)]
struct AttributeTypeAndOptionalValue {
    kind: ObjectIdentifier,
    #[asn1(optional = "true")]
    value: Option<Any>,
}

#[derive(Clone, Debug, Eq, PartialEq, Sequence, ValueOrd)]
struct DigestInfo {
    algorithm: AlgorithmIdentifierOwned,
    digest: OctetString,
}

/// The content of a signature over one image.
#[derive(Debug)]
pub(super) struct Content(Any);

impl Content {
    /// That of an image with `digest`.
    pub fn new(digest: &Digest) -> der::Result<Self> {
        let data = IndirectData {
            data: AttributeTypeAndOptionalValue {
                kind: PE_IMAGE_DATA,
                value: Some(der::Decode::from_der(&IMAGE_DATA)?),
            },
            digest: DigestInfo {
                algorithm: pkcs7::sha256(),
                digest: OctetString::new(digest.as_bytes().as_slice())?,
            },
        };
        Ok(Self(Any::encode_from(&data)?))
    }

    /// What a message digest is over: the content without tag and length (PKCS #7 §9.3).
    pub fn octets(&self) -> &[u8] {
        self.0.value()
    }

    /// As it is in a message.
    pub fn into_info(self) -> EncapsulatedContentInfo {
        EncapsulatedContentInfo { econtent_type: INDIRECT_DATA, econtent: Some(self.0) }
    }
}

/// The SHA-256 digest in `info`, none where it is another algorithm's; and the octets that were signed.
pub(super) fn digest(info: &EncapsulatedContentInfo) -> der::Result<(Option<Digest>, Vec<u8>)> {
    if info.econtent_type != INDIRECT_DATA {
        return Err(der::ErrorKind::OidUnknown { oid: info.econtent_type }.into());
    }
    let content = info.econtent.as_ref().ok_or(der::ErrorKind::Incomplete {
        expected_len: der::Length::ONE,
        actual_len: der::Length::ZERO,
    })?;
    let data: IndirectData = content.decode_as()?;
    if data.data.kind != PE_IMAGE_DATA {
        return Err(der::ErrorKind::OidUnknown { oid: data.data.kind }.into());
    }
    let bytes = <[u8; 32]>::try_from(data.digest.digest.as_bytes());
    let digest = match (data.digest.algorithm.oid == pkcs7::SHA256, bytes) {
        (true, Ok(bytes)) => Some(Digest::from_bytes(bytes)),
        (true, Err(_)) => return Err(der::Tag::OctetString.length_error().into()),
        (false, _) => None,
    };
    Ok((digest, content.value().to_vec()))
}
