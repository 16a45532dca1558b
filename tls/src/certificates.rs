//! The certificates of a server, by name. They can be replaced while it runs.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, RwLock};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use crate::config::crypto_provider;
use crate::error::LoadError;

/// The certificates that a server presents: a default one, and others by name.
///
/// The default is for clients that ask for no name (SNI), and for names that have none of
/// their own. Each certificate can be replaced at any time, from any thread. Handshakes
/// that begin later use the new one; established connections go on as they are. A clone is
/// cheap and shares the same certificates.
///
/// # Examples
///
/// A program that loads its certificate again when it is told to:
///
/// ```no_run
/// # use bowline::tls::{Certificates, TlsServer};
/// let certificates = Certificates::from_pem_files("server.crt", "server.key")?;
/// let tls = TlsServer::with_certificates(&certificates);
/// // Later, at SIGHUP for example. Where it fails, those of before stay.
/// certificates.load_pem_files("server.crt", "server.key")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Feature `tls`, or `tls-aws-lc-rs`.
#[derive(Clone)]
pub struct Certificates(Arc<Shared>);

struct Shared {
    chains: RwLock<Chains>,
}

#[derive(Clone)]
struct Chains {
    /// What is presented where no name matches.
    default: Option<Arc<CertifiedKey>>,
    /// By name in lower case; `*.` stands for any one label in front.
    named: BTreeMap<Box<str>, Arc<CertifiedKey>>,
}

impl Certificates {
    /// Makes one with this certificate as the default. `chain` begins with the server's own
    /// certificate; `key` is the private key of that.
    ///
    /// # Errors
    ///
    /// The key cannot be used, or it does not belong to the certificate.
    ///
    /// # Panics
    ///
    /// As [`crypto_provider`].
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, LoadError> {
        Ok(Self(Arc::new(Shared {
            chains: RwLock::new(Chains {
                default: Some(certified(chain, key)?),
                named: BTreeMap::new(),
            }),
        })))
    }

    /// Makes one with the default loaded from PEM files: the certificate chain, and the
    /// key.
    ///
    /// # Errors
    ///
    /// A file cannot be loaded, or the key does not belong to the certificate.
    ///
    /// # Panics
    ///
    /// As [`crypto_provider`].
    pub fn from_pem_files(
        chain: impl AsRef<Path>,
        key: impl AsRef<Path>,
    ) -> Result<Self, LoadError> {
        let (chain, key) = load(chain.as_ref(), key.as_ref())?;
        Self::new(chain, key)
    }

    /// Makes one without a default. A client that asks for no name, or for a name that is
    /// not set, is refused.
    pub fn only_named() -> Self {
        Self(Arc::new(Shared {
            chains: RwLock::new(Chains {
                default: None,
                named: BTreeMap::new(),
            }),
        }))
    }

    /// Replaces the default certificate.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new). The previous certificate stays then.
    pub fn set(
        &self,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<(), LoadError> {
        let certified = certified(chain, key)?;
        self.change(|chains| chains.default = Some(certified));
        Ok(())
    }

    /// Replaces the default certificate by one from PEM files.
    ///
    /// # Errors
    ///
    /// As [`from_pem_files`](Self::from_pem_files). The previous certificate stays then.
    pub fn load_pem_files(
        &self,
        chain: impl AsRef<Path>,
        key: impl AsRef<Path>,
    ) -> Result<(), LoadError> {
        let (chain, key) = load(chain.as_ref(), key.as_ref())?;
        self.set(chain, key)
    }

    /// Sets the certificate for clients that ask for `name`, and replaces the one it had. A
    /// name that begins with `*.` matches every name that has one label in its place; an
    /// exact name is preferred to it.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new). The previous certificate stays then.
    pub fn set_named(
        &self,
        name: &str,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<(), LoadError> {
        let certified = certified(chain, key)?;
        let name = name.to_ascii_lowercase().into_boxed_str();
        self.change(|chains| drop(chains.named.insert(name, certified)));
        Ok(())
    }

    /// Goes back to the default certificate for `name`. Returns whether `name` had one of
    /// its own.
    pub fn remove_named(&self, name: &str) -> bool {
        let name = name.to_ascii_lowercase();
        let mut had = false;
        self.change(|chains| had = chains.named.remove(&*name).is_some());
        had
    }

    /// Returns these certificates in the form that a rustls configuration takes
    /// (`with_cert_resolver`).
    pub fn resolver(&self) -> Arc<dyn ResolvesServerCert> {
        Arc::new(self.clone())
    }

    fn change(&self, change: impl FnOnce(&mut Chains)) {
        // Nothing in there can be half done.
        let chains = self.0.chains.write();
        change(&mut chains.unwrap_or_else(std::sync::PoisonError::into_inner));
    }

    fn find(&self, name: Option<&str>) -> Option<Arc<CertifiedKey>> {
        let chains = self.0.chains.read();
        let chains = chains.unwrap_or_else(std::sync::PoisonError::into_inner);
        let named = name.and_then(|name| {
            let name = name.to_ascii_lowercase();
            let wild = || {
                let (_, rest) = name.split_once('.')?;
                chains.named.get(format!("*.{rest}").as_str())
            };
            chains.named.get(name.as_str()).or_else(wild)
        });
        named.or(chains.default.as_ref()).cloned()
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.find(client_hello.server_name())
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates").finish_non_exhaustive()
    }
}

fn certified(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<CertifiedKey>, LoadError> {
    let provider = crypto_provider();
    Ok(Arc::new(CertifiedKey::from_der(chain, key, &provider)?))
}

/// Loads a certificate chain and a key from PEM files.
pub(crate) fn load(
    chain: &Path,
    key: &Path,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), LoadError> {
    let failed = |path: &Path, error| LoadError::File {
        path: path.into(),
        error,
    };
    let certificates = CertificateDer::pem_file_iter(chain)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| failed(chain, error))?;
    if certificates.is_empty() {
        return Err(LoadError::NoCertificate(chain.into()));
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| failed(key, error))?;
    Ok((certificates, private))
}
