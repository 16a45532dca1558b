//! Certificates of a server, by name, that are replaced while it serves.

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

/// The certificates that a server shows: one for whoever asks for no name, or for none
/// that we know, and others by name.
///
/// They can be replaced at any time, from any thread; handshakes that begin later show the
/// new ones, and connections that are there go on. It is cheap to clone, and clones are
/// the same certificates.
///
/// # Examples
///
/// A program that loads them again when it is told to:
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
    /// What is shown where no name fits.
    default: Option<Arc<CertifiedKey>>,
    /// By name in lower case; `*.` for any one label in front.
    named: BTreeMap<Box<str>, Arc<CertifiedKey>>,
}

impl Certificates {
    /// A chain, ours first, with the key of ours.
    ///
    /// # Errors
    ///
    /// The key cannot be used, or is not that of the certificate.
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

    /// The same, from PEM files: the chain, and the key.
    ///
    /// # Errors
    ///
    /// One of them cannot be loaded, or they do not belong together.
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

    /// None but those with a name: whoever asks for another name, or for none, is refused.
    pub fn only_named() -> Self {
        Self(Arc::new(Shared {
            chains: RwLock::new(Chains {
                default: None,
                named: BTreeMap::new(),
            }),
        }))
    }

    /// Replaces the certificate for whoever asks for no name that we know.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new); what was there stays.
    pub fn set(
        &self,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<(), LoadError> {
        let certified = certified(chain, key)?;
        self.change(|chains| chains.default = Some(certified));
        Ok(())
    }

    /// The same, from PEM files.
    ///
    /// # Errors
    ///
    /// As [`from_pem_files`](Self::from_pem_files); what was there stays.
    pub fn load_pem_files(
        &self,
        chain: impl AsRef<Path>,
        key: impl AsRef<Path>,
    ) -> Result<(), LoadError> {
        let (chain, key) = load(chain.as_ref(), key.as_ref())?;
        self.set(chain, key)
    }

    /// Shows this certificate to whoever asks for `name`, instead of what it was shown
    /// before. A name that begins with `*.` stands for all with one label in its place;
    /// the exact name goes before that.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new); what was there stays.
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

    /// Shows whoever asks for `name` the certificate for everybody again. Whether there
    /// was another.
    pub fn remove_named(&self, name: &str) -> bool {
        let name = name.to_ascii_lowercase();
        let mut had = false;
        self.change(|chains| had = chains.named.remove(&*name).is_some());
        had
    }

    /// They as a configuration of rustls takes them (`with_cert_resolver`).
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

/// A chain and a key, from PEM files.
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
