//! Where configurations of rustls begin.

use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::CryptoProvider;
use rustls::{
    ClientConfig, ConfigBuilder, RootCertStore, ServerConfig, WantsVerifier, WantsVersions,
};

/// How long a handshake may take, unless set: as
/// [`LimitHandshakes`](bowline_protocol::policies::LimitHandshakes) has it.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// The cryptography that is used: what the process has installed
/// (`CryptoProvider::install_default`), or else that of the feature `ring`, or else that
/// of `aws-lc-rs`.
///
/// # Panics
///
/// There is none.
///
/// Feature `tls`, or `tls-aws-lc-rs`.
pub fn crypto_provider() -> Arc<CryptoProvider> {
    found_provider()
        .expect("no provider of cryptography: enable `ring` or `aws-lc-rs`, or install one")
}

/// The same, if there is one.
pub(crate) fn found_provider() -> Option<Arc<CryptoProvider>> {
    if let Some(installed) = CryptoProvider::get_default() {
        return Some(Arc::clone(installed));
    }
    #[cfg(feature = "ring")]
    return Some(Arc::new(rustls::crypto::ring::default_provider()));
    #[cfg(all(feature = "aws-lc-rs", not(feature = "ring")))]
    return Some(Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    #[cfg(not(any(feature = "ring", feature = "aws-lc-rs")))]
    None
}

/// Begins the configuration of a server, of TLS 1.2 and 1.3.
///
/// # Panics
///
/// As [`crypto_provider`].
///
/// Feature `tls`, or `tls-aws-lc-rs`.
pub fn server_config_builder() -> ConfigBuilder<ServerConfig, WantsVerifier> {
    safe(ServerConfig::builder_with_provider(crypto_provider()))
}

/// Begins the configuration of a client, of TLS 1.2 and 1.3.
///
/// # Panics
///
/// As [`crypto_provider`].
///
/// Feature `tls`, or `tls-aws-lc-rs`.
pub fn client_config_builder() -> ConfigBuilder<ClientConfig, WantsVerifier> {
    safe(ClientConfig::builder_with_provider(crypto_provider()))
}

fn safe<S: rustls::ConfigSide>(
    builder: ConfigBuilder<S, WantsVersions>,
) -> ConfigBuilder<S, WantsVerifier> {
    let builder = builder.with_safe_default_protocol_versions();
    builder.expect("a provider has suites of both versions")
}

/// A client that trusts these roots and shows no certificate.
///
/// # Panics
///
/// As [`crypto_provider`].
///
/// Feature `tls`, or `tls-aws-lc-rs`.
pub fn client_config(roots: RootCertStore) -> ClientConfig {
    client_config_builder()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

/// A client that trusts Mozilla's roots, as they were when this was built, and shows no
/// certificate. Feature `webpki-roots`.
///
/// # Panics
///
/// As [`crypto_provider`].
///
/// Feature `tls-webpki-roots`.
#[cfg(feature = "webpki-roots")]
pub fn client_config_with_webpki_roots() -> ClientConfig {
    client_config(webpki_roots::TLS_SERVER_ROOTS.iter().cloned().collect())
}

/// A client that trusts what the system trusts, checked as the system checks it, and shows
/// no certificate. Feature `platform-verifier`.
///
/// # Errors
///
/// The system's roots are not to be had.
///
/// # Panics
///
/// As [`crypto_provider`].
///
/// Feature `tls-platform-verifier`.
#[cfg(feature = "platform-verifier")]
pub fn client_config_with_platform_verifier() -> Result<ClientConfig, rustls::Error> {
    use rustls_platform_verifier::BuilderVerifierExt as _;
    Ok(client_config_builder()
        .with_platform_verifier()?
        .with_no_client_auth())
}
