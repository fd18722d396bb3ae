//! Somebody who signs, with the same key in each run: what an input does depends on the input alone.

use std::str::FromStr as _;
use std::time::Duration;

use der::{Decode as _, Encode as _};
use kiln_artifact::uefi::Signer;
use kiln_artifact::uefi::authenticode::{Others, Request};
use kiln_artifact::uefi::pe::Image;
use rsa::BoxedUint;
use rsa::pkcs1v15::SigningKey;
use rsa::pkcs8::EncodePublicKey as _;
use rsa::signature::{Keypair as _, SignatureEncoding as _, Signer as _};
use sha2::Sha256;
use x509_cert::TbsCertificate;
use x509_cert::builder::profile::BuilderProfile;
use x509_cert::builder::{Builder as _, CertificateBuilder};
use x509_cert::ext::Extension;
use x509_cert::name::Name;
use x509_cert::serial_number::SerialNumber;
use x509_cert::spki::SubjectPublicKeyInfoRef;
use x509_cert::time::{Time, Validity};

/// The private key, which is no secret: two primes of 1,024 bits.
const PRIMES: [&str; 2] = [
    "dc4650699ddc7c890b096ed0887c7ae3d8c511807a9b6fc042a1111485635669436be69efc3575126cb72f25c42007dc3408bbb54131\
     a5c7770265fed4ebdd7ab59537777ade48df41b5a1d5d19ee81008ad1eb20b9a111d4edfcd30f30b4d3faa79ebb0179b179fcd652a16\
     28dcd132be1c2a6d9bd78a36b72c284c412143d3",
    "ffb3b58227b33658c9e52fd5f9eeccb746ffad2ff8d0c89edd38bce79434616db951b99a4d16a510bde1219722c859db81d573f4185a\
     2dd72ce5462ea8d9b484e50638fd947a08d71595fcf0c3b9aa0d3168c094b6955899cdb9e09a4643d114c969bbedaaab6bcc1ff683eb\
     4e78677beb0d97882eb7e4946bbf7c550988bbab",
];

pub struct Owner {
    pub signer: Signer,
    key: SigningKey<Sha256>,
}

impl Owner {
    pub fn new() -> Self {
        let [p, q] = PRIMES.map(|prime| BoxedUint::from_be_hex(prime, 1024).into_option().expect("a number"));
        let key = rsa::PrivateKey::from_p_q(p, q, BoxedUint::from(65_537_u64)).expect("primes");
        let key = SigningKey::<Sha256>::new(key);
        let public = key.verifying_key().to_public_key_der().expect("a key");
        let public = x509_cert::spki::SubjectPublicKeyInfoOwned::from_der(public.as_bytes()).expect("a key");
        let at = |years: u64| {
            let time = der::DateTime::from_unix_duration(Duration::from_secs(years * 365 * 24 * 3600));
            Time::GeneralTime(time.expect("a time").into())
        };
        let name = Name::from_str("CN=fuzz").expect("a name");
        let serial = SerialNumber::new(&[7]).expect("a number");
        let builder = CertificateBuilder::new(Alone(name), serial, Validity::new(at(50), at(90)), public);
        let certificate = builder.expect("a certificate").build::<_, rsa::pkcs1v15::Signature>(&key);
        let der = certificate.and_then(|certificate| Ok(certificate.to_der()?)).expect("a certificate");
        Self { signer: Signer::from_der(&der).expect("a certificate"), key }
    }

    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.key.sign(message).to_vec()
    }

    /// The image with a signature after those that it has.
    pub fn sign_image(&self, bytes: &[u8]) -> Vec<u8> {
        let image = Image::parse(bytes).expect("an image");
        let request = Request::new(&image, &self.signer).expect("a request");
        let signature = self.sign(request.to_be_signed());
        request.attach(&signature, Others::Keep).expect("a signature")
    }
}

/// A certificate that says who it is and no more.
struct Alone(Name);

impl BuilderProfile for Alone {
    fn get_issuer(&self, subject: &Name) -> Name {
        subject.clone()
    }

    fn get_subject(&self) -> Name {
        self.0.clone()
    }

    fn build_extensions(
        &self,
        _key: SubjectPublicKeyInfoRef<'_>,
        _issuer_key: SubjectPublicKeyInfoRef<'_>,
        _tbs: &TbsCertificate,
    ) -> x509_cert::builder::Result<Vec<Extension>> {
        Ok(Vec::new())
    }
}
