//! Whom servers are trusted by: a file of certificate authorities, and what is wrong with a certificate that none of them
//! vouches for.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use der::Decode as _;
use rustls::CertificateError;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

/// Why a file of certificate authorities is of no use.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// It cannot be read.
    #[error("cannot read the certificate authorities in `{path}`")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// It is no PEM, or what is in it is no certificate.
    #[error("`{path}` has no certificate in PEM form")]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
}

impl AuthorityError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Read { .. } => {
                "name the authority's certificate with --ca-file, KILN_CA_FILE or `ca-file` in [settings]; without it, those \
                 that browsers trust are trusted"
                    .to_owned()
            }
            Self::NoCertificate { path } => format!(
                "one in DER form becomes PEM by `openssl x509 -inform DER -in {} -out ca.pem`",
                path.display()
            ),
        })
    }
}

/// How to speak TLS with servers that the authorities in the file `path` vouch for, and no others.
///
/// # Errors
/// [`AuthorityError`].
pub(super) fn trusting(path: &Path) -> Result<TlsConfig, AuthorityError> {
    let failed = |source| AuthorityError::Read { path: path.to_owned(), source };
    let bytes = fs::read(path).map_err(failed)?;
    let no_certificate = || AuthorityError::NoCertificate { path: path.to_owned() };
    let mut found: Vec<Certificate<'static>> = Vec::new();
    for item in parse_pem(&bytes) {
        if let PemItem::Certificate(certificate) = item.map_err(|_| no_certificate())? {
            x509_cert::Certificate::from_der(certificate.der()).map_err(|_| no_certificate())?;
            found.push(certificate);
        }
    }
    match found.is_empty() {
        true => Err(no_certificate()),
        false => Ok(TlsConfig::builder().root_certs(RootCerts::new_with_certs(&found)).build()),
    }
}

/// What is wrong with a server's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Untrusted {
    /// None that is trusted signed it.
    Authority,
    /// It is another host's.
    Host,
    /// Its time is over.
    Expired,
    /// Its time has not begun.
    Early,
    /// Anything else: a signature that is wrong, a key that may not do this, one that was revoked.
    Other,
}

impl fmt::Display for Untrusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Authority => "is signed by no authority that is trusted",
            Self::Host => "is another host's",
            Self::Expired => "has expired",
            Self::Early => "is not valid yet",
            Self::Other => "is not valid",
        })
    }
}

impl Untrusted {
    /// What `error` says of a certificate, where it is about one.
    pub(super) fn of(error: &ureq::Error) -> Option<Self> {
        let error = match error {
            ureq::Error::Rustls(error) => error,
            ureq::Error::Io(error) => error.get_ref()?.downcast_ref::<rustls::Error>()?,
            _ => return None,
        };
        let rustls::Error::InvalidCertificate(error) = error else { return None };
        Some(match error {
            CertificateError::UnknownIssuer => Self::Authority,
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => Self::Host,
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Self::Early,
            _ => Self::Other,
        })
    }

    /// What the user can do about it.
    pub(super) fn hint(self) -> String {
        match self {
            Self::Authority => {
                "where an authority of your own signed it, name that one's certificate with --ca-file, KILN_CA_FILE or \
                 `ca-file` in [settings]; a file named there is trusted in place of those that browsers trust"
            }
            Self::Host => "name the server as its certificate does, or another mirror",
            Self::Expired => "the server's certificate must be renewed; or this host's clock is wrong (`date`)",
            Self::Early => "this host's clock may be wrong (`date`)",
            Self::Other => "see what is wrong with it: `openssl s_client -connect HOST:443`",
        }
        .to_owned()
    }
}
