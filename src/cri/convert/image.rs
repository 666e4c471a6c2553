//! Images and credentials (cri-behaviour §13).

use base64::Engine as _;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::model::error::{Error, Result};
use crate::model::image::Image;
use crate::provisioner::Credentials;
use crate::wire::cri as wire;

/// Other names of Docker's registry in old client configurations.
const DOCKER_ALIASES: &[&str] = &["index.docker.io", "registry-1.docker.io"];
/// Clients pad or do not pad `auth`.
const BASE64: GeneralPurpose =
    GeneralPurpose::new(&base64::alphabet::STANDARD, GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent));

/// An image in lists and status.
pub fn to_wire(image: &Image) -> wire::Image {
    let (uid, username) = image.user();
    wire::Image {
        id: image.id.to_string(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        uid: uid.map(|value| wire::Int64Value { value }),
        username,
        spec: Some(wire::ImageSpec { image: image.id.to_string(), ..Default::default() }),
        pinned: image.pinned,
    }
}

/// An image's verbose information.
pub fn info(image: &Image) -> Value {
    let config = serde_json::from_str::<Value>(&image.config_json).unwrap_or_default();
    json!({ "chainID": chain_id(image), "imageSpec": config })
}

/// Identity of the whole stack of layers (OCI image specification, layer ChainID).
fn chain_id(image: &Image) -> String {
    image.layers.iter().fold(String::new(), |below, layer| {
        if below.is_empty() {
            return layer.diff_id.to_string();
        }
        let digest = Sha256::digest(format!("{below} {}", layer.diff_id));
        digest.iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
    })
}

/// Credentials of a pull; `None` when there are none in it.
///
/// # Errors
/// `InvalidArgument` when `auth` is malformed. The text never holds what was given.
pub fn credentials(wire: wire::AuthConfig) -> Result<Option<Credentials>> {
    let (username, password) = if wire.username.is_empty() && wire.password.is_empty() && !wire.auth.is_empty() {
        decode_auth(&wire.auth).ok_or_else(|| Error::invalid("auth is not the base64 of user:password"))?
    } else {
        (wire.username, wire.password)
    };
    let credentials = Credentials {
        username,
        password,
        identity_token: wire.identity_token,
        registry_token: wire.registry_token,
        server_address: registry_host(&wire.server_address),
    };
    let anonymous = [&credentials.username, &credentials.password, &credentials.identity_token, &credentials.registry_token].iter().all(|s| s.is_empty());
    Ok(Some(credentials).filter(|_| !anonymous))
}

/// `user:password` in base64; old Docker clients leave NULs at the end.
fn decode_auth(auth: &str) -> Option<(String, String)> {
    let text = String::from_utf8(BASE64.decode(auth.trim_end_matches('\0')).ok()?).ok()?;
    let (username, password) = text.split_once(':')?;
    Some((username.to_owned(), password.trim_end_matches('\0').to_owned()))
}

/// The host of a server address, which may be written as a URL, under the name that references have it.
fn registry_host(address: &str) -> String {
    let host = address.strip_prefix("https://").or_else(|| address.strip_prefix("http://")).unwrap_or(address);
    let host = host.split('/').next().unwrap_or_default();
    if DOCKER_ALIASES.contains(&host) { "docker.io".to_owned() } else { host.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auth(auth: &str) -> Result<Option<Credentials>> {
        credentials(wire::AuthConfig { auth: auth.into(), ..Default::default() })
    }

    #[test]
    fn auth_is_decoded() {
        for text in ["dXNlcjpwYTpzcw==", "dXNlcjpwYTpzcw", "dXNlcjpwYTpzcwAA"] {
            let c = auth(text).unwrap().unwrap();
            assert_eq!((c.username.as_str(), c.password.as_str()), ("user", "pa:ss"), "{text}");
        }
        for bad in ["%%%", "dXNlcg=="] {
            let e = auth(bad).err().unwrap();
            assert!(e.kind == crate::model::Kind::InvalidArgument && !e.to_string().contains(bad), "{e}");
        }
    }

    #[test]
    fn a_name_and_password_win_over_auth() {
        let c = credentials(wire::AuthConfig { username: "u".into(), password: "p".into(), auth: "%".into(), ..Default::default() }).unwrap().unwrap();
        assert_eq!((c.username.as_str(), c.password.as_str()), ("u", "p"));
    }

    #[test]
    fn nothing_is_anonymous() {
        assert!(credentials(wire::AuthConfig { server_address: "r".into(), ..Default::default() }).unwrap().is_none());
        assert!(credentials(wire::AuthConfig { registry_token: "t".into(), ..Default::default() }).unwrap().is_some());
    }

    #[test]
    fn server_addresses() {
        for (address, host) in
            [("https://index.docker.io/v1/", "docker.io"), ("r.example:5000", "r.example:5000"), ("http://r.example/v2", "r.example"), ("", "")]
        {
            assert_eq!(registry_host(address), host);
        }
    }
}
