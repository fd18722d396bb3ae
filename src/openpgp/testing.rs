//! Keys and signatures for tests: what an archive's owner does, which kiln itself never does.
//!
//! Built only with the feature `testing`. Every key is an Ed25519 primary key that only certifies, with one
//! subkey that signs, as in Debian's keys.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "made for tests, which fail by panicking")]

use pgp::composed::{
    ArmorOptions, CleartextSignedMessage, KeyType, SecretKeyParamsBuilder, SignedPublicKey, SignedSecretKey,
    SubkeyParamsBuilder,
};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{
    KeyFlags, PacketTrait as _, SignatureConfig, SignatureType, Subpacket, SubpacketData, UserId,
};
use pgp::ser::Serialize as _;
use pgp::types::{Duration, KeyDetails as _, PacketHeaderVersion, Password, Timestamp};

/// A key that signs.
pub struct TestKey(SignedSecretKey);

/// How a signature is made.
#[derive(Debug, Clone, Copy)]
pub struct SignOptions {
    /// The moment it claims to be made at, in seconds since the epoch; now, where none is given.
    pub made_at: Option<u32>,
    /// The hash it rests on.
    pub hash: HashAlgorithm,
    /// After how many seconds it expires; 0 for never.
    pub lifetime_seconds: u32,
}

impl Default for SignOptions {
    fn default() -> Self {
        Self { made_at: None, hash: HashAlgorithm::Sha512, lifetime_seconds: 0 }
    }
}

impl TestKey {
    /// A new key.
    pub fn generate() -> Self {
        Self::generate_with(KeyType::Ed25519Legacy)
    }

    /// A new key whose subkey is an RSA key of 2,048 bits: the kind that can sign with any hash.
    pub fn generate_rsa() -> Self {
        Self::generate_with(KeyType::Rsa(2048))
    }

    fn generate_with(subkey: KeyType) -> Self {
        let subkey = SubkeyParamsBuilder::default().key_type(subkey).can_sign(true).build().unwrap();
        let params = SecretKeyParamsBuilder::default()
            .key_type(KeyType::Ed25519Legacy)
            .can_certify(true)
            .can_sign(false)
            .primary_user_id("Archive <archive@test.example>".into())
            .subkey(subkey)
            .build()
            .unwrap();
        Self(params.generate(rand::thread_rng()).unwrap())
    }

    /// The public key, in binary.
    pub fn public(&self) -> Vec<u8> {
        self.0.to_public_key().to_bytes().unwrap()
    }

    /// The public key, armored.
    pub fn public_armored(&self) -> Vec<u8> {
        self.0.to_public_key().to_armored_bytes(ArmorOptions::default()).unwrap()
    }

    fn certify(&self, typ: SignatureType, subpackets: Vec<SubpacketData>) -> SignatureConfig {
        let primary = &self.0.primary_key;
        let mut config = SignatureConfig::from_key(rand::thread_rng(), primary, typ).unwrap();
        config.hashed_subpackets = [
            SubpacketData::SignatureCreationTime(Timestamp::now()),
            SubpacketData::IssuerFingerprint(primary.fingerprint()),
        ]
        .into_iter()
        .chain(subpackets)
        .map(|data| Subpacket::regular(data).unwrap())
        .collect();
        config
    }

    /// The public key as it would be if its primary key expired `lifetime_seconds` after it was made.
    pub fn public_expiring(&self, lifetime_seconds: u32) -> Vec<u8> {
        let mut public: SignedPublicKey = self.0.to_public_key();
        let mut flags = KeyFlags::default();
        flags.set_certify(true);
        let config = self.certify(
            SignatureType::CertPositive,
            vec![
                SubpacketData::KeyExpirationTime(Duration::from_secs(lifetime_seconds)),
                SubpacketData::KeyFlags(flags),
            ],
        );
        let id = UserId::from_str(PacketHeaderVersion::New, "Archive <archive@test.example>").unwrap();
        let signature = config
            .sign_certification(
                &self.0.primary_key,
                self.0.primary_key.public_key(),
                &Password::empty(),
                id.tag(),
                &id,
            )
            .unwrap();
        public.details.users = vec![id.into_signed(signature)];
        public.to_bytes().unwrap()
    }

    /// The public key with a revocation by its owner.
    pub fn public_revoked(&self) -> Vec<u8> {
        let mut public: SignedPublicKey = self.0.to_public_key();
        let config = self.certify(SignatureType::KeyRevocation, vec![]);
        let primary = &self.0.primary_key;
        let signature = config.sign_key(primary, &Password::empty(), primary.public_key()).unwrap();
        public.details.revocation_signatures = vec![signature];
        public.to_bytes().unwrap()
    }

    /// The public key with this key's subkey but `other`'s primary key and user: a claim on a foreign subkey.
    pub fn public_claimed_by(&self, other: &Self) -> Vec<u8> {
        let mut public: SignedPublicKey = other.0.to_public_key();
        public.public_subkeys = self.0.to_public_key().public_subkeys;
        public.to_bytes().unwrap()
    }

    fn config(&self, typ: SignatureType, options: SignOptions) -> SignatureConfig {
        let key = &self.0.secret_subkeys[0].key;
        let mut config = SignatureConfig::v4(typ, key.algorithm(), options.hash);
        let made = options.made_at.map_or_else(Timestamp::now, Timestamp::from_secs);
        let mut subpackets = vec![
            SubpacketData::SignatureCreationTime(made),
            SubpacketData::IssuerFingerprint(key.fingerprint()),
        ];
        if options.lifetime_seconds != 0 {
            subpackets
                .push(SubpacketData::SignatureExpirationTime(Duration::from_secs(options.lifetime_seconds)));
        }
        config.hashed_subpackets =
            subpackets.into_iter().map(|data| Subpacket::regular(data).unwrap()).collect();
        config
    }

    /// `text` as a cleartext-signed document.
    pub fn sign_cleartext(&self, text: &str, options: SignOptions) -> Vec<u8> {
        let config = self.config(SignatureType::Text, options);
        let key = &self.0.secret_subkeys[0].key;
        let message = CleartextSignedMessage::new(text, config, key, &Password::empty()).unwrap();
        message.to_armored_bytes(ArmorOptions::default()).unwrap()
    }

    /// A signature over `text`, in binary.
    pub fn sign_detached(&self, text: &[u8], options: SignOptions) -> Vec<u8> {
        let config = self.config(SignatureType::Binary, options);
        let key = &self.0.secret_subkeys[0].key;
        let signature = config.sign(key, &Password::empty(), text).unwrap();
        let mut bytes = Vec::new();
        signature.to_writer_with_header(&mut bytes).unwrap();
        bytes
    }
}
