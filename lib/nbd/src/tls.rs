//! TLS settings: the mode of a listener, and configurations made from PEM files.

use std::path::Path;
use std::sync::Arc;

use rustls::crypto::aws_lc_rs::default_provider;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Whether a listener's connections are encrypted (`NBD_OPT_STARTTLS`).
#[derive(Clone, Default)]
pub enum Tls {
    /// Never: for Unix sockets.
    #[default]
    Off,
    /// If the client wants it.
    Allowed(Arc<ServerConfig>),
    /// Always: nothing is answered before.
    Required(Arc<ServerConfig>),
}

/// A TLS configuration that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A PEM file is missing, unreadable or without what it should hold.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: String,
        /// What is wrong with it.
        source: rustls_pki_types::pem::Error,
    },
    /// A certificate, key or name that TLS refuses.
    #[error("the certificates are not usable: {0}")]
    Refused(String),
}

/// A server's configuration from PEM files. With `client_ca`, every client must show a certificate
/// that this authority has signed. TLS 1.2 is taken beside 1.3: Debian 12's `nbd-client` speaks no
/// other (its priorities are `NORMAL:-VERS-TLS-ALL:+VERS-TLS1.2`).
pub fn server_config(
    certificate: &Path,
    key: &Path,
    client_ca: Option<&Path>,
) -> Result<Arc<ServerConfig>, TlsError> {
    let builder = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(refused)?;
    let builder = match client_ca {
        Some(ca) => {
            let provider = Arc::new(default_provider());
            let roots = Arc::new(roots(ca)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
            builder.with_client_cert_verifier(verifier.build().map_err(refused)?)
        }
        None => builder.with_no_client_auth(),
    };
    let config = builder.with_single_cert(chain(certificate)?, private_key(key)?);
    Ok(Arc::new(config.map_err(refused)?))
}

/// A client's configuration: the authority it trusts, and its own certificate and key if any.
pub fn client_config(
    ca: &Path,
    identity: Option<(&Path, &Path)>,
) -> Result<Arc<ClientConfig>, TlsError> {
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(refused)?
        .with_root_certificates(roots(ca)?);
    let config = match identity {
        Some((certificate, key)) => builder
            .with_client_auth_cert(chain(certificate)?, private_key(key)?)
            .map_err(refused)?,
        None => builder.with_no_client_auth(),
    };
    Ok(Arc::new(config))
}

/// The name a certificate speaks for: its first DNS name, else its common name.
pub(crate) fn peer_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let alternative = parsed.subject_alternative_name().ok().flatten().and_then(|names| {
        names.value.general_names.iter().find_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            _ => None,
        })
    });
    alternative.or_else(|| {
        let common = parsed.subject().iter_common_name().next()?;
        common.as_str().ok().map(str::to_owned)
    })
}

fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    found.map_err(|source| file_error(path, source))
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|source| file_error(path, source))
}

fn roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in chain(path)? {
        roots.add(certificate).map_err(refused)?;
    }
    Ok(roots)
}

fn file_error(path: &Path, source: rustls_pki_types::pem::Error) -> TlsError {
    TlsError::File { path: path.display().to_string(), source }
}

fn refused(error: impl std::fmt::Display) -> TlsError {
    TlsError::Refused(error.to_string())
}
