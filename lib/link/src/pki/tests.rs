use rcgen::{CertificateParams, KeyPair};
use rustls::client::{WebPkiServerVerifier, danger::ServerCertVerifier};

use super::*;

fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

fn issued(authority: &Authority, node: &str) -> CertificateAndKey {
    authority.issue(&name(node)).unwrap()
}

#[test]
fn names_are_dns_labels() {
    for good in ["a", "db-1", "0", &"x".repeat(63)] {
        assert_eq!(name(good).as_str(), good);
        let _ = name(good).server_name();
    }
    for bad in ["", "-a", "a-", "A", "a.b", "a b", "a_b", "ä", &"x".repeat(64), "a\n"] {
        assert!(bad.parse::<NodeName>().is_err(), "{bad:?}");
    }
    assert_eq!(name("db-1").dns_name(), "db-1.tidemark.internal");
    assert_eq!(serde_json::to_string(&name("db")).unwrap(), "\"db\"");
    assert!(serde_json::from_str::<NodeName>("\"DB\"").is_err());
}

#[test]
fn a_certificate_carries_the_name_and_serves_both_ends() {
    let authority = Authority::create("test").unwrap();
    let pem = issued(&authority, "db-1");
    let identity =
        Identity::from_pem(pem.certificate_pem.as_bytes(), pem.key_pem.as_bytes()).unwrap();
    assert_eq!(identity.name(), &name("db-1"));
    let trust = Trust::from_pem(authority.pem().certificate_pem.as_bytes()).unwrap();
    assert_eq!(trust.roots().len(), 1);
    let client = client_config(&identity, &trust).unwrap();
    let server = server_config(&identity, &trust).unwrap();
    assert!(client.client_auth_cert_resolver.has_certs());
    assert_eq!(server.send_tls13_tickets, 0, "no session is resumed");
}

#[test]
fn an_authority_is_kept_as_text() {
    let first = Authority::create("test").unwrap();
    let again = Authority::from_pem(first.pem().clone()).unwrap();
    let pem = issued(&again, "late");
    let identity = Identity::from_pem(pem.certificate_pem.as_bytes(), pem.key_pem.as_bytes());
    // The first authority's certificate is believed for what the second handle issued.
    let trust = Trust::from_pem(first.pem().certificate_pem.as_bytes()).unwrap();
    let verifier = WebPkiClientVerifier::builder_with_provider(trust.0, provider()).build();
    let now = rustls_pki_types::UnixTime::now();
    let chain = identity.unwrap().chain;
    verifier.unwrap().verify_client_cert(&chain[0], &[], now).unwrap();

    let mut mixed = first.pem().clone();
    mixed.key_pem = "no key".into();
    assert!(Authority::from_pem(mixed).is_err());
}

#[test]
fn a_key_of_another_certificate_is_refused() {
    let authority = Authority::create("test").unwrap();
    let (one, other) = (issued(&authority, "one"), issued(&authority, "other"));
    let identity =
        Identity::from_pem(one.certificate_pem.as_bytes(), other.key_pem.as_bytes()).unwrap();
    let trust = Trust::from_pem(authority.pem().certificate_pem.as_bytes()).unwrap();
    assert!(matches!(client_config(&identity, &trust), Err(PkiError::Config(_))));
    assert!(matches!(server_config(&identity, &trust), Err(PkiError::Config(_))));
}

#[test]
fn files_that_hold_something_else_are_refused_with_what_was_wanted() {
    let authority = Authority::create("test").unwrap();
    let pem = issued(&authority, "one");
    let (certificate, key) = (pem.certificate_pem.as_bytes(), pem.key_pem.as_bytes());
    let error = Identity::from_pem(key, key).unwrap_err().to_string();
    assert!(error.contains("certificate"), "{error}");
    let error = Identity::from_pem(certificate, certificate).unwrap_err().to_string();
    assert!(error.contains("private key"), "{error}");
    assert!(Trust::from_pem(b"").is_err());
    assert!(Trust::from_pem(&key[..key.len() / 2]).is_err());
    // An authority's certificate names no node.
    let authority = authority.pem();
    let error =
        Identity::from_pem(authority.certificate_pem.as_bytes(), authority.key_pem.as_bytes());
    assert!(matches!(error, Err(PkiError::NoName(_))));
}

#[test]
fn a_certificate_names_exactly_one_node() {
    let certificate = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let params = CertificateParams::new(names).unwrap();
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    };
    let good = certificate(&["www.example.org", "db.tidemark.internal"]);
    assert_eq!(peer_name(&[good]).unwrap(), name("db"));
    for bad in [
        &["www.example.org"][..],
        &["a.tidemark.internal", "b.tidemark.internal"],
        &["a.b.tidemark.internal"],
        &["*.tidemark.internal"],
    ] {
        assert!(peer_name(&[certificate(bad)]).is_err(), "{bad:?}");
    }
    assert!(peer_name(&[]).is_err());
    assert!(peer_name(&[CertificateDer::from(vec![1, 2, 3])]).is_err());
}

#[test]
fn a_node_is_verified_by_its_addresses_and_stays_who_it_is() {
    let authority = Authority::create("test").unwrap();
    let addresses = ["192.0.2.7", "2001:db8::7", "DR.example.org."].map(|a| a.parse().unwrap());
    let pem = authority.issue_for(&name("recovery"), &addresses).unwrap();
    let identity =
        Identity::from_pem(pem.certificate_pem.as_bytes(), pem.key_pem.as_bytes()).unwrap();
    assert_eq!(identity.name(), &name("recovery"));

    let trust = Trust::from_pem(authority.pem().certificate_pem.as_bytes()).unwrap();
    let verifier = WebPkiServerVerifier::builder_with_provider(trust.0, provider()).build();
    let verifier = verifier.unwrap();
    let is_verified_as = |host: &'static str| {
        let (host, now) = (ServerName::try_from(host).unwrap(), rustls_pki_types::UnixTime::now());
        verifier.verify_server_cert(&identity.chain()[0], &[], &host, &[], now).is_ok()
    };
    for good in ["192.0.2.7", "2001:db8::7", "dr.example.org", "recovery.tidemark.internal"] {
        assert!(is_verified_as(good), "{good}");
    }
    for bad in ["192.0.2.8", "2001:db8::8", "example.org", "db.tidemark.internal"] {
        assert!(!is_verified_as(bad), "{bad}");
    }
}

#[test]
fn an_address_is_a_host_name_or_an_ip_address_and_no_node() {
    for bad in [
        "",
        ".",
        "a b",
        "192.0.2.256",
        "192.0.2.7:10809",
        "https://example.org",
        "*.example.org",
        "db.tidemark.internal",
        "DB.Tidemark.Internal.",
        "tidemark.internal",
    ] {
        assert!(matches!(bad.parse::<Address>(), Err(PkiError::Address(_))), "{bad:?}");
    }
}
