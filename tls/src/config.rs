//! Begins rustls configurations.

use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::CryptoProvider;
use rustls::{
    ClientConfig, ConfigBuilder, RootCertStore, ServerConfig, WantsVerifier, WantsVersions,
};

/// How long a handshake may take by default: as long as
/// [`LimitHandshakes`](bowline_protocol::policies::LimitHandshakes) allows.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// Returns the cryptography to use: the provider that the process has installed
/// (`CryptoProvider::install_default`), or else that of the feature `ring`, or else that of
/// `aws-lc-rs`.
///
/// # Panics
///
/// No provider is installed, and neither feature is on.
///
/// Feature `tls`, or `tls-aws-lc-rs`.
pub fn crypto_provider() -> Arc<CryptoProvider> {
    found_provider()
        .expect("no provider of cryptography: enable `ring` or `aws-lc-rs`, or install one")
}

/// Returns the same, if there is one.
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

/// Begins the configuration of a server that speaks TLS 1.2 and 1.3.
///
/// # Panics
///
/// As [`crypto_provider`].
///
/// Feature `tls`, or `tls-aws-lc-rs`.
pub fn server_config_builder() -> ConfigBuilder<ServerConfig, WantsVerifier> {
    safe(ServerConfig::builder_with_provider(crypto_provider()))
}

/// Begins the configuration of a client that speaks TLS 1.2 and 1.3.
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

/// Returns the configuration of a client that trusts these roots and presents no
/// certificate.
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

/// Returns the configuration of a client that trusts Mozilla's roots, in the version of
/// the crate `webpki-roots` that is built in. It presents no certificate. Feature
/// `webpki-roots`.
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

/// Returns the configuration of a client that trusts what the system trusts, and verifies
/// as the system does. It presents no certificate. Feature `platform-verifier`.
///
/// # Errors
///
/// The system's roots cannot be loaded.
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
