//! Authenticated variables: a signature list, and whose signature lets firmware take it (UEFI 2.10 §8.2.2,
//! EFI_VARIABLE_AUTHENTICATION_2). As with images, what is to be signed goes out and a signature comes in.

use cms::signed_data::{EncapsulatedContentInfo, SignedData};
use der::{Decode, Encode};

use super::esl::Guid;
use super::pkcs7::{self, Signed, Signer};

/// EFI_GLOBAL_VARIABLE.
const GLOBAL: Guid = Guid::new(0x8be4_df61, 0x93ca, 0x11d2, [0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c]);
/// EFI_IMAGE_SECURITY_DATABASE_GUID.
const SECURITY: Guid =
    Guid::new(0xd719_b2cb, 0x3d3a, 0x4596, [0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f]);
/// EFI_CERT_TYPE_PKCS7_GUID.
const PKCS7: Guid = Guid::new(0x4aaf_d29d, 0x68df, 0x49ee, [0x8a, 0xa9, 0x34, 0x7d, 0x37, 0x56, 0x65, 0xa7]);
/// EFI_VARIABLE_NON_VOLATILE, _BOOTSERVICE_ACCESS, _RUNTIME_ACCESS and _TIME_BASED_AUTHENTICATED_WRITE_ACCESS.
const ATTRIBUTES: u32 = 0x27;
/// EFI_VARIABLE_APPEND_WRITE.
const APPEND: u32 = 0x40;
/// WIN_CERT_TYPE_EFI_GUID.
const EFI_GUID: u16 = 0x0ef1;
/// EFI_TIME.
const TIME_BYTES: usize = 16;
/// WIN_CERTIFICATE_UEFI_GUID before its data.
const CERTIFICATE_BYTES: usize = 24;

/// Which variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variable {
    /// The platform's owner. One certificate, so writing replaces.
    Pk,
    /// Who may change `db`. Writing appends.
    Kek,
    /// Whose images start. Writing appends.
    Db,
}

impl Variable {
    /// All, in the order in which a firmware in setup mode takes them: with PK, setup mode ends.
    pub const ENROLMENT: [Self; 3] = [Self::Db, Self::Kek, Self::Pk];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pk => "PK",
            Self::Kek => "KEK",
            Self::Db => "db",
        }
    }

    fn vendor(self) -> &'static Guid {
        match self {
            Self::Pk | Self::Kek => &GLOBAL,
            Self::Db => &SECURITY,
        }
    }

    fn attributes(self) -> u32 {
        match self {
            Self::Pk => ATTRIBUTES,
            Self::Kek | Self::Db => ATTRIBUTES | APPEND,
        }
    }
}

/// A point in time as firmware keeps it, in UTC and whole seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Time {
    /// From 1900.
    pub year: u16,
    /// From 1.
    pub month: u8,
    /// From 1.
    pub day: u8,
    /// From 0.
    pub hour: u8,
    /// From 0.
    pub minute: u8,
    /// From 0.
    pub second: u8,
}

impl Time {
    /// EFI_TIME (UEFI 2.10 §8.3): nanosecond, time zone and daylight saving are zero in a variable's.
    fn to_bytes(self) -> [u8; TIME_BYTES] {
        let [low, high] = self.year.to_le_bytes();
        let mut bytes = [0; TIME_BYTES];
        bytes[..7].copy_from_slice(&[low, high, self.month, self.day, self.hour, self.minute, self.second]);
        bytes
    }
}

/// Why there is no enrolment file, or none that firmware would take.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// A signature that is not the signer's over what was to be signed.
    #[error("the signature is not by the signer over this `{0}` variable")]
    NotOverThis(&'static str),
    /// A structure that cannot be encoded or read.
    #[error("the signature cannot be encoded or read")]
    Form(#[source] der::Error),
    /// Sizes that do not fit, another type of certificate.
    #[error("not an authenticated variable")]
    NotAuthenticated,
}

/// A signature over a variable that is yet to be made.
#[derive(Debug)]
pub struct Request<'a> {
    variable: Variable,
    time: [u8; TIME_BYTES],
    list: &'a [u8],
    bytes: Vec<u8>,
}

impl<'a> Request<'a> {
    /// A request for `variable` to be `list` as of `time`, which must be later than what firmware has where it replaces.
    pub fn new(variable: Variable, time: Time, list: &'a [u8]) -> Self {
        let time = time.to_bytes();
        Self { variable, time, list, bytes: covered(variable, variable.attributes(), &time, list) }
    }

    /// The bytes to sign, with RSASSA-PKCS1-v1_5 and SHA-256.
    pub fn to_be_signed(&self) -> &[u8] {
        &self.bytes
    }

    /// The enrolment file with `signer`'s `signature`.
    ///
    /// # Errors
    /// [`AuthError`].
    pub fn attach(&self, signer: &Signer, signature: &[u8]) -> Result<Vec<u8>, AuthError> {
        if !signer.has_signed(&self.bytes, signature) {
            return Err(AuthError::NotOverThis(self.variable.name()));
        }
        let content = EncapsulatedContentInfo { econtent_type: pkcs7::DATA, econtent: None };
        // "The SignedData": without the ContentInfo around it, which some firmware does not take.
        let message = pkcs7::message(signer, content, None, signature).and_then(|data| data.to_der());
        let message = message.map_err(AuthError::Form)?;
        let length =
            u32::try_from(CERTIFICATE_BYTES + message.len()).map_err(|_| AuthError::NotAuthenticated)?;
        let mut file = self.time.to_vec();
        file.extend(length.to_le_bytes());
        file.extend(super::pe::REVISION.to_le_bytes());
        file.extend(EFI_GUID.to_le_bytes());
        file.extend(PKCS7.as_bytes());
        file.extend(message);
        file.extend(self.list);
        Ok(file)
    }
}

/// What a signature over a variable is over (UEFI 2.10 §8.2.2).
fn covered(variable: Variable, attributes: u32, time: &[u8; TIME_BYTES], list: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> = variable.name().encode_utf16().flat_map(u16::to_le_bytes).collect();
    bytes.extend(variable.vendor().as_bytes());
    bytes.extend(attributes.to_le_bytes());
    bytes.extend(time);
    bytes.extend(list);
    bytes
}

/// Reads the enrolment `file` of `variable`, verifies that `signer` signed it, and returns the signature list.
///
/// # Errors
/// [`AuthError`].
pub fn verify<'a>(variable: Variable, file: &'a [u8], signer: &Signer) -> Result<&'a [u8], AuthError> {
    let (time, rest) = file.split_first_chunk::<TIME_BYTES>().ok_or(AuthError::NotAuthenticated)?;
    let (length, _) = rest.split_first_chunk::<4>().ok_or(AuthError::NotAuthenticated)?;
    let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| AuthError::NotAuthenticated)?;
    let (certificate, list) = rest.split_at_checked(length).ok_or(AuthError::NotAuthenticated)?;
    let (header, message) =
        certificate.split_at_checked(CERTIFICATE_BYTES).ok_or(AuthError::NotAuthenticated)?;
    if header[4..6] != super::pe::REVISION.to_le_bytes()
        || header[6..8] != EFI_GUID.to_le_bytes()
        || header[8..] != *PKCS7.as_bytes()
    {
        return Err(AuthError::NotAuthenticated);
    }
    let message = SignedData::from_der(message).map_err(AuthError::Form)?;
    // Others make files for KEK and db that replace; firmware takes those as well.
    let signed = [variable.attributes(), ATTRIBUTES].into_iter().any(|attributes| {
        let bytes = covered(variable, attributes, time, list);
        pkcs7::verify(&message, &Signed::Detached(&bytes), signer)
    });
    if message.encap_content_info.econtent_type != pkcs7::DATA || !signed {
        return Err(AuthError::NotOverThis(variable.name()));
    }
    Ok(list)
}
