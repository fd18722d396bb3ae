//! PKCS #7 messages with one RSA signer and SHA-256, as firmware takes them (RFC 2315, RFC 5652), and who signed.
//!
//! No time is in a message and the padding is PKCS #1 v1.5, so the same key over the same bytes gives the same message.
//! Authenticode and authenticated variables put them to use. Private keys are elsewhere.

use cms::cert::{CertificateChoices, IssuerAndSerialNumber};
use cms::content_info::CmsVersion;
use cms::signed_data::{
    CertificateSet, EncapsulatedContentInfo, SignedData, SignerIdentifier, SignerInfo, SignerInfos,
};
use der::asn1::{ObjectIdentifier, OctetString, SetOfVec};
use der::{Any, Decode, DecodePem, Encode};
use kiln_digest::Digest;
use rsa::pkcs1v15::{Signature, VerifyingKey};
use rsa::signature::Verifier;
use rsa::traits::PublicKeyParts;
use sha2::Sha256;
use x509_cert::Certificate;
use x509_cert::attr::{Attribute, Attributes};
use x509_cert::spki::AlgorithmIdentifierOwned;

/// id-signedData.
pub(super) const SIGNED_DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.7.2");
/// id-data.
pub(super) const DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.7.1");
/// id-sha256.
pub(super) const SHA256: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.1");
const CONTENT_TYPE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.3");
const MESSAGE_DIGEST: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.4");
const RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const SHA256_WITH_RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.11");
/// Shorter moduli are not what firmware's owners should trust.
const MODULUS_BITS_MIN: u32 = 2048;

/// Why a certificate cannot stand for a signer.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// No X.509 certificate in DER or PEM.
    #[error("not an X.509 certificate")]
    Form(#[source] der::Error),
    /// Another encoding of the same certificate, which a signature would not name.
    #[error("the certificate is not encoded as DER wants it")]
    Encoding,
    /// No RSA key.
    #[error("the certificate's key is no RSA key")]
    Key(#[source] x509_cert::spki::Error),
    /// An RSA key that is too short.
    #[error("the certificate's key has {0} bits; at least 2,048 are needed")]
    Short(u32),
}

/// Somebody who signs, known by a certificate.
#[derive(Debug, Clone)]
pub struct Signer {
    certificate: Certificate,
    der: Vec<u8>,
    key: VerifyingKey<Sha256>,
}

impl Signer {
    /// The signer that `der` is the certificate of.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn from_der(der: &[u8]) -> Result<Self, CertificateError> {
        Self::new(Certificate::from_der(der).map_err(CertificateError::Form)?, der)
    }

    /// The same, from `CERTIFICATE` in PEM.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn from_pem(pem: &[u8]) -> Result<Self, CertificateError> {
        let certificate = Certificate::from_pem(pem).map_err(CertificateError::Form)?;
        let der = certificate.to_der().map_err(CertificateError::Form)?;
        Self::new(certificate, &der)
    }

    fn new(certificate: Certificate, der: &[u8]) -> Result<Self, CertificateError> {
        if certificate.to_der().map_err(CertificateError::Form)? != der {
            return Err(CertificateError::Encoding);
        }
        let spki = certificate.tbs_certificate().subject_public_key_info();
        let spki = spki.to_der().map_err(CertificateError::Form)?;
        let spki = rsa::pkcs8::SubjectPublicKeyInfoRef::from_der(&spki).map_err(CertificateError::Form)?;
        let key = rsa::PublicKey::try_from(spki).map_err(CertificateError::Key)?;
        let bits = key.n().bit_width();
        if bits < MODULUS_BITS_MIN {
            return Err(CertificateError::Short(bits));
        }
        Ok(Self { certificate, der: der.to_vec(), key: VerifyingKey::new(key) })
    }

    /// The certificate.
    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    /// The certificate's bytes.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// The public key.
    pub fn key(&self) -> &rsa::PublicKey {
        self.key.as_ref()
    }

    /// Whether `signature` is this signer's over `message` (RSASSA-PKCS1-v1_5 with SHA-256).
    pub fn has_signed(&self, message: &[u8], signature: &[u8]) -> bool {
        Signature::try_from(signature).is_ok_and(|signature| self.key.verify(message, &signature).is_ok())
    }

    fn identifier(&self) -> SignerIdentifier {
        let tbs = self.certificate.tbs_certificate();
        SignerIdentifier::IssuerAndSerialNumber(IssuerAndSerialNumber {
            issuer: tbs.issuer().clone(),
            serial_number: tbs.serial_number().clone(),
        })
    }
}

/// SHA-256 with its parameters spelt out, which old verifiers want.
pub(super) fn sha256() -> AlgorithmIdentifierOwned {
    AlgorithmIdentifierOwned { oid: SHA256, parameters: Some(Any::null()) }
}

/// Attributes that say what is signed: its type, and its digest.
pub(super) fn attributes(content: ObjectIdentifier, digest: &Digest) -> der::Result<Attributes> {
    let one = |oid, value: Any| -> der::Result<Attribute> {
        Ok(Attribute { oid, values: SetOfVec::try_from(vec![value])? })
    };
    let digest = OctetString::new(digest.as_bytes().as_slice())?;
    SetOfVec::try_from(vec![
        one(CONTENT_TYPE, Any::encode_from(&content)?)?,
        one(MESSAGE_DIGEST, Any::encode_from(&digest)?)?,
    ])
}

/// A message in which `signer` signed `content`, by way of `attributes` where there are some.
pub(super) fn message(
    signer: &Signer,
    content: EncapsulatedContentInfo,
    attributes: Option<Attributes>,
    signature: &[u8],
) -> der::Result<SignedData> {
    let info = SignerInfo {
        version: CmsVersion::V1,
        sid: signer.identifier(),
        digest_alg: sha256(),
        signed_attrs: attributes,
        signature_algorithm: AlgorithmIdentifierOwned { oid: RSA_ENCRYPTION, parameters: Some(Any::null()) },
        signature: OctetString::new(signature)?,
        unsigned_attrs: None,
    };
    Ok(SignedData {
        // PKCS #7's version; CMS has another for contents that are not plain data, which firmware does not expect.
        version: CmsVersion::V1,
        digest_algorithms: SetOfVec::try_from(vec![sha256()])?,
        encap_content_info: content,
        certificates: Some(CertificateSet::try_from(vec![CertificateChoices::Certificate(
            signer.certificate.clone(),
        )])?),
        crls: None,
        signer_infos: SignerInfos::try_from(vec![info])?,
    })
}

/// What a message says that was signed.
pub(super) enum Signed<'a> {
    /// Content that is not in the message, directly.
    Detached(&'a [u8]),
    /// Content in it, of this type, whose octets are these without tag and length.
    Content(ObjectIdentifier, &'a [u8]),
}

/// Whether `signer` signed, in `message`, what `signed` has.
pub(super) fn verify(message: &SignedData, signed: &Signed<'_>, signer: &Signer) -> bool {
    let [info] = message.signer_infos.0.as_slice() else { return false };
    if info.sid != signer.identifier()
        || info.digest_alg.oid != SHA256
        || ![RSA_ENCRYPTION, SHA256_WITH_RSA].contains(&info.signature_algorithm.oid)
    {
        return false;
    }
    let signature = info.signature.as_bytes();
    match (&info.signed_attrs, signed) {
        (None, Signed::Detached(content)) => signer.has_signed(content, signature),
        (Some(attributes), Signed::Content(kind, octets)) => {
            let wanted = (Any::encode_from(kind), OctetString::new(Digest::of(octets).as_bytes().as_slice()));
            let (Ok(kind), Ok(digest)) = wanted else { return false };
            let Ok(digest) = Any::encode_from(&digest) else { return false };
            has(attributes, CONTENT_TYPE, &kind)
                && has(attributes, MESSAGE_DIGEST, &digest)
                && attributes.to_der().is_ok_and(|attributes| signer.has_signed(&attributes, signature))
        }
        _ => false,
    }
}

/// Whether there is one attribute `oid`, with one value, which is `value`.
fn has(attributes: &Attributes, oid: ObjectIdentifier, value: &Any) -> bool {
    let mut found = attributes.iter().filter(|attribute| attribute.oid == oid);
    let (Some(attribute), None) = (found.next(), found.next()) else { return false };
    attribute.values.as_slice() == std::slice::from_ref(value)
}
