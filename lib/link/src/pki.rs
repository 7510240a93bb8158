//! The private certificate authority, the nodes' certificates, and the TLS of the link.
//!
//! A node's identity is its [`NodeName`], which stands in its certificate as the DNS name
//! `NAME.tidemark.internal`. One certificate serves both as a client's and as a server's. The link
//! takes TLS 1.3 alone, both ends show a certificate of the authority, and a session is never
//! resumed, so that every connection checks certificates afresh.

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::{CryptoProvider, aws_lc_rs},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use serde::{Deserialize, Serialize};
use x509_parser::{extensions::GeneralName, prelude::FromDer};

/// What follows a node's name in its certificate.
const DOMAIN: &str = ".tidemark.internal";
/// What the link is called in TLS, so that a connection meant for another service ends there.
pub(crate) const ALPN: &[u8] = b"tidemark-link";
/// The longest node name.
const NAME_BYTES_MAX: usize = 63;
/// The longest host name.
const ADDRESS_BYTES_MAX: usize = 253;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const AUTHORITY_LIFE: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);
const NODE_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// What goes wrong with certificates and keys.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A text that is no name.
    #[error(
        "'{0}' is not a node name: 1 to 63 of a-z, 0-9 and '-' are wanted, with no '-' at either end"
    )]
    Name(String),
    /// A text that is no host's address, or one that would name another node.
    #[error(
        "'{0}' is not an address that NBD clients could use: a host name or an IP address is \
         wanted, and none in tidemark.internal, whose names are the nodes' own"
    )]
    Address(String),
    /// A file that does not hold what it should.
    #[error("no {what} can be read from this PEM text: {why}")]
    Pem {
        /// What was looked for.
        what: &'static str,
        /// Why it was not found.
        why: String,
    },
    /// A certificate without a node's name.
    #[error("the certificate names no node: {0}")]
    NoName(String),
    /// A certificate could not be made.
    #[error("the certificate cannot be made: {0}")]
    Make(#[from] rcgen::Error),
    /// No randomness.
    #[error("the kernel gives no randomness: {0}")]
    Random(String),
    /// Certificate, key and authority do not go together.
    #[error("these certificates and keys cannot be used: {0}")]
    Config(#[from] rustls::Error),
    /// The authority's certificate cannot be used to check others.
    #[error("this authority cannot be used: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// A node's identity: 1 to 63 of `a-z`, `0-9` and `-`, with no `-` at either end.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(String);

impl NodeName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name that stands in the node's certificate.
    pub fn dns_name(&self) -> String {
        format!("{}{DOMAIN}", self.0)
    }

    pub(crate) fn server_name(&self) -> ServerName<'static> {
        ServerName::try_from(self.dns_name()).expect("every node name is a valid DNS label")
    }
}

impl FromStr for NodeName {
    type Err = PkiError;

    fn from_str(text: &str) -> Result<NodeName, PkiError> {
        NodeName::try_from(text.to_owned())
    }
}

impl TryFrom<String> for NodeName {
    type Error = PkiError;

    fn try_from(text: String) -> Result<NodeName, PkiError> {
        let good = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
        let bounded = (1..=NAME_BYTES_MAX).contains(&text.len());
        if !bounded || !text.bytes().all(good) || text.starts_with('-') || text.ends_with('-') {
            return Err(PkiError::Name(text.chars().take(NAME_BYTES_MAX + 1).collect()));
        }
        Ok(NodeName(text))
    }
}

impl From<NodeName> for String {
    fn from(name: NodeName) -> String {
        name.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeName({})", self.0)
    }
}

/// A host name or an IP address at which NBD clients reach a node. The names in `tidemark.internal`
/// are not among them: they say which node it is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Address(String);

impl FromStr for Address {
    type Err = PkiError;

    fn from_str(text: &str) -> Result<Address, PkiError> {
        let name = text.trim_end_matches('.').to_ascii_lowercase();
        match ServerName::try_from(name.as_str()) {
            Ok(_) if !format!(".{name}").ends_with(DOMAIN) => Ok(Address(name)),
            _ => Err(PkiError::Address(text.chars().take(ADDRESS_BYTES_MAX).collect())),
        }
    }
}

/// A certificate and its private key, as PEM text. The key is a secret: write it to a file that
/// only its owner can read.
#[derive(Clone)]
pub struct CertificateAndKey {
    /// The certificate.
    pub certificate_pem: String,
    /// The private key, PKCS#8.
    pub key_pem: String,
}

/// A private certificate authority.
pub struct Authority {
    pem: CertificateAndKey,
}

impl Authority {
    /// Makes a new authority. `label` is for people who look at its certificate; random digits
    /// after it tell two authorities of the same label apart.
    ///
    /// # Errors
    /// [`PkiError::Make`] or [`PkiError::Random`].
    pub fn create(label: &str) -> Result<Authority, PkiError> {
        let mark = getrandom::u32().map_err(|error| PkiError::Random(error.to_string()))?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, format!("{label} {mark:08x}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        lives(&mut params, AUTHORITY_LIFE);
        let certificate = params.self_signed(&key)?;
        Ok(Authority {
            pem: CertificateAndKey {
                certificate_pem: certificate.pem(),
                key_pem: key.serialize_pem(),
            },
        })
    }

    /// An authority made before.
    ///
    /// # Errors
    /// [`PkiError::Make`] when the texts hold no certificate and key.
    pub fn from_pem(pem: CertificateAndKey) -> Result<Authority, PkiError> {
        let authority = Authority { pem };
        authority.issuer()?;
        Ok(authority)
    }

    /// Its certificate, which every node needs, and its key, which stays where nodes are enrolled.
    pub fn pem(&self) -> &CertificateAndKey {
        &self.pem
    }

    /// Makes a node's certificate and key.
    ///
    /// # Errors
    /// [`PkiError::Make`].
    pub fn issue(&self, name: &NodeName) -> Result<CertificateAndKey, PkiError> {
        self.issue_for(name, &[])
    }

    /// Makes a certificate and key for a node that NBD clients reach at these addresses: unlike the
    /// link, they compare what they connected to with what is in it.
    ///
    /// # Errors
    /// [`PkiError::Make`].
    pub fn issue_for(
        &self,
        name: &NodeName,
        addresses: &[Address],
    ) -> Result<CertificateAndKey, PkiError> {
        let key = KeyPair::generate()?;
        let mut names = vec![name.dns_name()];
        names.extend(addresses.iter().map(|address| address.0.clone()));
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, name.as_str());
        // QEMU refuses certificates without the second.
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        lives(&mut params, NODE_LIFE);
        let certificate = params.signed_by(&key, &self.issuer()?)?;
        Ok(CertificateAndKey { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    fn issuer(&self) -> Result<Issuer<'static, KeyPair>, PkiError> {
        let key = KeyPair::from_pem(&self.pem.key_pem)?;
        Ok(Issuer::from_ca_cert_pem(&self.pem.certificate_pem, key)?)
    }
}

/// Valid from a day ago, since the other node's clock may be behind.
fn lives(params: &mut CertificateParams, life: Duration) {
    let now = std::time::SystemTime::now();
    params.not_before = (now - DAY).into();
    params.not_after = (now + life).into();
}

/// A node's own certificate and key.
#[derive(Debug)]
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    name: NodeName,
}

impl Identity {
    /// Reads a node's certificate (with any intermediate ones after it) and key.
    ///
    /// # Errors
    /// [`PkiError::Pem`] or [`PkiError::NoName`].
    pub fn from_pem(certificate_pem: &[u8], key_pem: &[u8]) -> Result<Identity, PkiError> {
        let chain = certificates(certificate_pem)?;
        let key = PrivateKeyDer::from_pem_slice(key_pem)
            .map_err(|error| PkiError::Pem { what: "private key", why: error.to_string() })?;
        let name = peer_name(&chain)?;
        Ok(Identity { chain, key, name })
    }

    /// The node's name.
    pub fn name(&self) -> &NodeName {
        &self.name
    }

    /// The certificates, the node's own first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The private key.
    pub fn key(&self) -> &PrivateKeyDer<'static> {
        &self.key
    }
}

/// The authorities whose certificates are believed.
#[derive(Clone, Debug)]
pub struct Trust(Arc<RootCertStore>);

impl Trust {
    /// Reads one or several authorities' certificates.
    ///
    /// # Errors
    /// [`PkiError::Pem`] or [`PkiError::Config`].
    pub fn from_pem(pem: &[u8]) -> Result<Trust, PkiError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(pem)? {
            roots.add(certificate)?;
        }
        Ok(Trust(Arc::new(roots)))
    }

    /// The certificates as rustls wants them.
    pub fn roots(&self) -> &Arc<RootCertStore> {
        &self.0
    }
}

/// The TLS of a node that is connected to. Clients must show a certificate of the authority.
///
/// # Errors
/// [`PkiError::Config`] or [`PkiError::Verifier`].
pub fn server_config(identity: &Identity, trust: &Trust) -> Result<Arc<ServerConfig>, PkiError> {
    let verifier =
        WebPkiClientVerifier::builder_with_provider(trust.0.clone(), provider()).build()?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// The TLS of a node that connects. Which server it must find is said per connection.
///
/// # Errors
/// [`PkiError::Config`].
pub fn client_config(identity: &Identity, trust: &Trust) -> Result<Arc<ClientConfig>, PkiError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(trust.0.clone())
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// The name in a node's certificate, the first of `certificates`. Says nothing of whether it is to
/// be believed: TLS has checked that.
///
/// # Errors
/// [`PkiError::NoName`].
pub fn peer_name(certificates: &[CertificateDer<'_>]) -> Result<NodeName, PkiError> {
    let none = |why: &str| PkiError::NoName(why.to_owned());
    let der = certificates.first().ok_or_else(|| none("there is no certificate"))?;
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(der)
        .map_err(|_| none("it cannot be read"))?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| none("its alternative names cannot be read"))?
        .ok_or_else(|| none("it has no alternative names"))?;
    let mut nodes = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::DNSName(name) => name.strip_suffix(DOMAIN),
        _ => None,
    });
    match (nodes.next(), nodes.next()) {
        (Some(name), None) => name.parse(),
        (None, _) => Err(none("none of its names ends in .tidemark.internal")),
        (Some(_), Some(_)) => Err(none("it carries several names")),
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    let fail = |why: String| PkiError::Pem { what: "certificate", why };
    let certificates = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| fail(error.to_string()))?;
    if certificates.is_empty() {
        return Err(fail("there is none in it".to_owned()));
    }
    Ok(certificates)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

#[cfg(test)]
mod tests;
