//! The variable store of EDK2's firmware, into which keys for Secure Boot are written before the firmware first runs.
//! `boot` makes one for each machine; nothing here knows QEMU.
//!
//! A store is a firmware volume (UEFI PI 1.7, volume 3, §3.2.1) whose first contents are the header of a variable store
//! and variables one after another, as EDK2's `MdeModulePkg/Include/Guid/VariableFormat.h` has them; unused space is all
//! ones, as of erased flash. Variables are only ever appended, to a store that has none of their names.

/// A GUID as it lies in memory: three little-endian numbers, then eight bytes.
pub type Guid = [u8; 16];

/// `EFI_GLOBAL_VARIABLE` (UEFI 2.10 §3.3), of PK and KEK.
pub const GLOBAL_VARIABLE: Guid =
    guid(0x8be4_df61, 0x93ca, 0x11d2, [0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c]);
/// `EFI_IMAGE_SECURITY_DATABASE` (UEFI 2.10 §32.6.1), of db and dbx.
pub const SECURITY_DATABASE: Guid =
    guid(0xd719_b2cb, 0x3d3a, 0x4596, [0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f]);
/// `gEfiSystemNvDataFvGuid` of EDK2, the kind of the volume.
const NV_DATA_VOLUME: Guid =
    guid(0xfff1_2b8d, 0x7696, 0x4c8b, [0xa9, 0x85, 0x27, 0x47, 0x07, 0x5b, 0x4f, 0x50]);
/// `gEfiAuthenticatedVariableGuid` of EDK2, the kind of the store.
const AUTHENTICATED_STORE: Guid =
    guid(0xaaf3_2c78, 0x947b, 0x439a, [0xa1, 0x80, 0x2e, 0x14, 0x4e, 0xc3, 0x77, 0x92]);
/// `EFI_CERT_X509_GUID` (UEFI 2.10 §32.4.1).
const CERT_X509: Guid = guid(0xa5c0_59a1, 0x94e4, 0x4aa7, [0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72]);

/// Kept over resets, seen by boot services, seen by the system (UEFI 2.10 §8.2.1).
const NON_VOLATILE_BOOT_RUNTIME: u32 = 0x7;
/// Written only by whoever signs what is written, with a time (the same).
const TIME_BASED_AUTHENTICATED: u32 = 0x20;

/// Where `FvLength`, the signature `_FVH` and `HeaderLength` lie in a volume's header.
const VOLUME_KIND: usize = 16;
const VOLUME_SIGNATURE: usize = 40;
const VOLUME_HEADER_LENGTH: usize = 48;
/// Of `VARIABLE_STORE_HEADER`.
const STORE_HEADER_BYTES: usize = 28;
/// Of `AUTHENTICATED_VARIABLE_HEADER`.
const VARIABLE_HEADER_BYTES: usize = 60;
/// What a variable starts with.
const START: [u8; 2] = [0xaa, 0x55];
/// `VAR_ADDED`: written whole, and not deleted.
const ADDED: u8 = 0x3f;

/// Why a variable could not be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VariableError {
    /// The bytes are no store for authenticated variables.
    #[error("this is no variable store of EDK2's firmware")]
    NotAStore,
    /// A variable in it has a length that leads out of it.
    #[error("the variable store is damaged at byte {0}")]
    Damaged(usize),
    /// There is such a variable.
    #[error("the variable store already has `{0}`")]
    Exists(String),
    /// There is no room.
    #[error("the variable store has no room for `{0}`")]
    Full(String),
}

/// A store.
#[derive(Debug, Clone)]
pub struct VariableStore {
    bytes: Vec<u8>,
    // Where the store ends in the volume.
    end: usize,
    // Where the next variable goes.
    free: usize,
    names: Vec<(Guid, Vec<u8>)>,
}

const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> Guid {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

/// A signature list (UEFI 2.10 §32.4.1) of one X.509 certificate in DER, which belongs to `owner`.
#[must_use]
pub fn certificate_list(owner: Guid, certificate: &[u8]) -> Vec<u8> {
    let signature_bytes = u32::try_from(certificate.len() + 16).unwrap_or(u32::MAX);
    let mut list = Vec::with_capacity(certificate.len() + 44);
    list.extend(CERT_X509);
    list.extend(signature_bytes.saturating_add(28).to_le_bytes());
    list.extend(0u32.to_le_bytes());
    list.extend(signature_bytes.to_le_bytes());
    list.extend(owner);
    list.extend(certificate);
    list
}

/// Whether the bytes are signature lists one after another, whole, with at least one signature.
#[must_use]
pub fn is_signature_lists(mut bytes: &[u8]) -> bool {
    let mut lists = 0;
    while !bytes.is_empty() {
        let number = |at: usize| usize::try_from(le32(bytes, at)?).ok();
        let (Some(size), Some(header), Some(signature)) = (number(16), number(20), number(24)) else {
            return false;
        };
        let signatures = size.checked_sub(28).and_then(|rest| rest.checked_sub(header));
        if signature <= 16 || size > bytes.len() || !signatures.is_some_and(|n| n > 0 && n % signature == 0) {
            return false;
        }
        bytes = &bytes[size..];
        lists += 1;
    }
    lists > 0
}

impl VariableStore {
    /// Reads a store, such as the empty one that a firmware comes with.
    ///
    /// # Errors
    /// It is none, or damaged.
    pub fn read(bytes: Vec<u8>) -> Result<Self, VariableError> {
        let part = |at: usize, length: usize| bytes.get(at..at.checked_add(length)?);
        if part(VOLUME_KIND, 16) != Some(&NV_DATA_VOLUME) || part(VOLUME_SIGNATURE, 4) != Some(b"_FVH") {
            return Err(VariableError::NotAStore);
        }
        let length = part(VOLUME_HEADER_LENGTH, 2).and_then(|length| length.try_into().ok());
        let start = usize::from(u16::from_le_bytes(length.ok_or(VariableError::NotAStore)?));
        if part(start, 16) != Some(&AUTHENTICATED_STORE) {
            return Err(VariableError::NotAStore);
        }
        let size = le32(&bytes, start + 16).and_then(|size| usize::try_from(size).ok());
        let end = size.and_then(|size| start.checked_add(size)).filter(|end| *end <= bytes.len());
        let end = end.ok_or(VariableError::NotAStore)?;
        let mut store = Self { free: start + STORE_HEADER_BYTES, end, names: Vec::new(), bytes };
        store.find_free()?;
        Ok(store)
    }

    fn find_free(&mut self) -> Result<(), VariableError> {
        while self.bytes.get(self.free..self.free + 2) == Some(&START) {
            let damaged = || VariableError::Damaged(self.free);
            let length = |at: usize| le32(&self.bytes, self.free + at).and_then(|n| usize::try_from(n).ok());
            let (name, data) = (length(36).ok_or_else(damaged)?, length(40).ok_or_else(damaged)?);
            let name_at = self.free + VARIABLE_HEADER_BYTES;
            let next = name_at.checked_add(name).and_then(|at| at.checked_add(data)).map(aligned);
            let next = next.filter(|next| *next <= self.end).ok_or_else(damaged)?;
            if self.bytes.get(self.free + 2) == Some(&ADDED) {
                let vendor = self.bytes[self.free + 44..name_at].try_into().map_err(|_| damaged())?;
                self.names.push((vendor, self.bytes[name_at..name_at + name].to_vec()));
            }
            self.free = next;
        }
        Ok(())
    }

    /// Adds a variable of the kind that PK, KEK and db are: authenticated, with a time. The firmware believes what is in
    /// its store; signatures are asked of later changes only.
    ///
    /// # Errors
    /// There is one of that name, or no room.
    pub fn add_authenticated(&mut self, name: &str, vendor: Guid, data: &[u8]) -> Result<(), VariableError> {
        let spelled = spelled(name);
        if self.has(name, vendor) {
            return Err(VariableError::Exists(name.to_owned()));
        }
        let full = || VariableError::Full(name.to_owned());
        let mut variable = Vec::new();
        variable.extend(START);
        variable.extend([ADDED, 0]);
        variable.extend((NON_VOLATILE_BOOT_RUNTIME | TIME_BASED_AUTHENTICATED).to_le_bytes());
        // The monotonic count, of another kind of variable.
        variable.extend(0u64.to_le_bytes());
        // EFI_TIME: 1980-01-01. Later changes must be signed with a later time.
        variable.extend(1980u16.to_le_bytes());
        variable.extend([1, 1]);
        variable.extend([0; 12]);
        // The index of a public key, of another kind of variable.
        variable.extend(0u32.to_le_bytes());
        for length in [spelled.len(), data.len()] {
            variable.extend(u32::try_from(length).map_err(|_| full())?.to_le_bytes());
        }
        variable.extend(vendor);
        variable.extend(&spelled);
        variable.extend(data);
        let place = self.free.checked_add(variable.len()).filter(|end| *end <= self.end);
        let place = self.free..place.ok_or_else(full)?;
        self.free = aligned(place.end);
        self.bytes[place].copy_from_slice(&variable);
        self.names.push((vendor, spelled));
        Ok(())
    }

    /// Whether there is such a variable.
    #[must_use]
    pub fn has(&self, name: &str, vendor: Guid) -> bool {
        let spelled = spelled(name);
        self.names.iter().any(|(of, known)| *of == vendor && *known == spelled)
    }

    /// The store's bytes.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

/// A name as a store has it.
fn spelled(name: &str) -> Vec<u8> {
    name.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect()
}

/// Variables begin at multiples of four.
fn aligned(at: usize) -> usize {
    at.next_multiple_of(4)
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    let part = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(part.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A volume of 4 KiB as a firmware has one: header, store header, erased flash.
    fn empty() -> Vec<u8> {
        let mut bytes = vec![0xff; 4096];
        bytes[..72].fill(0);
        bytes[VOLUME_KIND..32].copy_from_slice(&NV_DATA_VOLUME);
        bytes[VOLUME_SIGNATURE..44].copy_from_slice(b"_FVH");
        bytes[VOLUME_HEADER_LENGTH..50].copy_from_slice(&72u16.to_le_bytes());
        bytes[72..88].copy_from_slice(&AUTHENTICATED_STORE);
        bytes[88..92].copy_from_slice(&2048u32.to_le_bytes());
        bytes
    }

    #[test]
    fn what_is_added_is_found_again_and_only_once() {
        let mut store = VariableStore::read(empty()).expect("a store");
        store.add_authenticated("PK", GLOBAL_VARIABLE, b"first").expect("room");
        store.add_authenticated("db", SECURITY_DATABASE, b"second").expect("room");
        let mut again = VariableStore::read(store.into_bytes()).expect("a store");
        assert_eq!(again.names.len(), 2);
        assert!(again.has("PK", GLOBAL_VARIABLE) && !again.has("PK", SECURITY_DATABASE));
        let exists = Err(VariableError::Exists("PK".to_owned()));
        assert_eq!(again.add_authenticated("PK", GLOBAL_VARIABLE, b"third"), exists);
        again.add_authenticated("PK", SECURITY_DATABASE, b"another's").expect("it is another variable");
    }

    #[test]
    fn a_store_that_is_full_is_said_to_be() {
        let mut store = VariableStore::read(empty()).expect("a store");
        let full = Err(VariableError::Full("PK".to_owned()));
        assert_eq!(store.add_authenticated("PK", GLOBAL_VARIABLE, &[0; 2000]), full);
        store.add_authenticated("PK", GLOBAL_VARIABLE, &[0; 1900]).expect("room");
    }

    #[test]
    fn what_is_no_store_or_a_damaged_one_is_refused() {
        assert_eq!(VariableStore::read(vec![0; 4096]).err(), Some(VariableError::NotAStore));
        assert_eq!(VariableStore::read(Vec::new()).err(), Some(VariableError::NotAStore));
        let mut beyond = empty();
        beyond[88..92].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(VariableStore::read(beyond).err(), Some(VariableError::NotAStore));
        let mut store = VariableStore::read(empty()).expect("a store");
        store.add_authenticated("PK", GLOBAL_VARIABLE, b"key").expect("room");
        let mut bytes = store.into_bytes();
        bytes[100 + 40..100 + 44].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(VariableStore::read(bytes).err(), Some(VariableError::Damaged(100)));
    }

    #[test]
    fn signature_lists_are_told_from_other_bytes() {
        let list = certificate_list([7; 16], b"certificate");
        assert!(is_signature_lists(&list));
        assert!(is_signature_lists(&[list.clone(), list.clone()].concat()));
        assert!(!is_signature_lists(&list[1..]) && !is_signature_lists(&list[..list.len() - 1]));
        assert!(!is_signature_lists(b"") && !is_signature_lists(&[0x30; 200]));
    }
}
