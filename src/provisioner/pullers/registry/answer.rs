//! What a registry's answer means: status, error code and message turned into one error that says what to do about it.

use std::time::SystemTime;

use bytes::Bytes;
use reqwest::header::RETRY_AFTER;
use reqwest::{Response, StatusCode};

use super::retry::{Again, Failure, retry_after};
use crate::model::error::{Error, Kind, Result};

/// Bytes of an error answer that are read for its message.
const MAX_ERROR: u64 = 16 << 10;
/// Characters of a registry's message that are shown.
const MAX_SHOWN: usize = 200;

/// Users see this in front of the message in their pod's events.
const UNAVAILABLE: &str = "RegistryUnavailable: ";

/// A registry that cannot be used now.
pub fn unavailable(text: impl std::fmt::Display) -> Error {
    Error::new(Kind::Unavailable, format!("{UNAVAILABLE}{text}"))
}

/// A connection that failed. A certificate that is not trusted today is not trusted in a second either.
pub fn broken(act: &str, e: reqwest::Error) -> Failure {
    let lasting = is_tls(&e);
    // The URL of a redirect may hold a signature, which is a secret.
    let error = Error::with(Kind::Unavailable, format!("{UNAVAILABLE}{act}"), e.without_url());
    Failure { error, again: if lasting { Again::Never } else { Again::Soon } }
}

fn is_tls(e: &reqwest::Error) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(e);
    while let Some(cause) = next {
        if cause.is::<rustls::Error>() {
            return true;
        }
        // What an I/O error wraps is not among its sources; and it may wrap another one.
        next = match cause.downcast_ref::<std::io::Error>() {
            Some(io) => io.get_ref().map(|inner| inner as &(dyn std::error::Error + 'static)),
            None => cause.source(),
        };
    }
    false
}

/// Reads a body of at most `limit` bytes.
///
/// # Errors
/// `ResourceExhausted` beyond it, `Unavailable` when the connection breaks.
pub async fn bounded(mut response: Response, limit: u64, act: &str) -> Result<Bytes, Failure> {
    let too_long = || Failure::lasting(Error::new(Kind::ResourceExhausted, format!("{act}: the answer is longer than {limit} bytes")));
    if response.content_length().is_some_and(|n| n > limit) {
        return Err(too_long());
    }
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|e| broken(act, e))? {
        if (body.len() + chunk.len()) as u64 > limit {
            return Err(too_long());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.into())
}

/// The failure that an answer other than success is. `identified`: credentials were sent; `token`: a token server answered.
pub async fn refusal(response: Response, act: &str, identified: bool, token: bool) -> Failure {
    let status = response.status();
    let wait = retry_after(response.headers().get(RETRY_AFTER), SystemTime::now());
    let said = bounded(response, MAX_ERROR, act).await.ok().and_then(|body| Said::read(&body)).unwrap_or_default();
    let again = match status {
        StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => true,
        StatusCode::NOT_IMPLEMENTED | StatusCode::HTTP_VERSION_NOT_SUPPORTED => false,
        s => s.is_server_error(),
    };
    let (kind, meaning) = meaning(status, &said.code, identified, token);
    let prefix = if kind == Kind::Unavailable { UNAVAILABLE } else { "" };
    let waiting = wait.filter(|_| again).map(|w| format!(", try again in {} s", w.as_secs())).unwrap_or_default();
    let error = Error::new(kind, format!("{prefix}{act}: {meaning}{waiting} ({status}{})", said.shown()));
    Failure { error, again: if again { wait.map_or(Again::Soon, Again::After) } else { Again::Never } }
}

/// Class and words for a status. The registry's own code tells apart what the status does not.
fn meaning(status: StatusCode, code: &str, identified: bool, token: bool) -> (Kind, &'static str) {
    match status {
        // Token servers say 400 where they mean that a refresh token is not (or no longer) good.
        StatusCode::UNAUTHORIZED | StatusCode::BAD_REQUEST if token && identified => (Kind::Unauthenticated, "it refuses these credentials"),
        StatusCode::UNAUTHORIZED if identified => (Kind::Unauthenticated, "these credentials are refused"),
        StatusCode::UNAUTHORIZED => (Kind::Unauthenticated, "credentials are wanted, and there are none for it (or the repository does not exist)"),
        StatusCode::FORBIDDEN if token && !identified => (Kind::Unauthenticated, "it gives nothing to the anonymous"),
        StatusCode::FORBIDDEN if identified => (Kind::PermissionDenied, "these credentials are known but not allowed to read it"),
        StatusCode::FORBIDDEN => (Kind::PermissionDenied, "reading it is not allowed without credentials"),
        StatusCode::NOT_FOUND if token => (Kind::Unauthenticated, "it is no token server"),
        StatusCode::NOT_FOUND => (
            Kind::NotFound,
            match code {
                "MANIFEST_UNKNOWN" => "the repository has no such tag or digest",
                "NAME_UNKNOWN" => "there is no such repository",
                "NAME_INVALID" => "the registry does not take the name of the repository",
                "BLOB_UNKNOWN" => "the repository does not have this blob",
                _ => "it does not have it",
            },
        ),
        StatusCode::TOO_MANY_REQUESTS => (Kind::Unavailable, "too many requests"),
        StatusCode::REQUEST_TIMEOUT => (Kind::Unavailable, "it lost patience"),
        s if s.is_server_error() => (Kind::Unavailable, "it has failed"),
        s if s.is_redirection() => (Kind::PermissionDenied, "it leads nowhere"),
        StatusCode::BAD_REQUEST if token => (Kind::Unauthenticated, "it refuses the request"),
        _ => (Kind::Internal, "unexpected answer"),
    }
}

/// The first error of an error document.
#[derive(Default)]
struct Said {
    code: String,
    message: String,
}

impl Said {
    fn read(body: &[u8]) -> Option<Self> {
        let document: serde_json::Value = serde_json::from_slice(body).ok()?;
        let text = |value: Option<&serde_json::Value>| {
            let text = value.and_then(serde_json::Value::as_str).unwrap_or_default();
            text.chars().filter(|c| !c.is_control()).take(MAX_SHOWN).collect::<String>()
        };
        if let Some(first) = document.get("errors").and_then(|e| e.get(0)) {
            return Some(Self { code: text(first.get("code")), message: text(first.get("message")) });
        }
        // Token servers answer in the words of OAuth2.
        Some(Self { code: text(document.get("error")), message: text(document.get("error_description").or_else(|| document.get("details"))) })
    }

    fn shown(&self) -> String {
        match (self.code.as_str(), self.message.as_str()) {
            ("", "") => String::new(),
            ("", one) | (one, "") => format!(", {one}"),
            (code, message) => format!(", {code}: {message}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_and_codes_are_told_apart() {
        let of = |status: u16, code: &str, identified: bool| meaning(StatusCode::from_u16(status).unwrap(), code, identified, false);
        let all = [
            of(401, "UNAUTHORIZED", false),
            of(401, "UNAUTHORIZED", true),
            of(403, "DENIED", true),
            of(403, "DENIED", false),
            of(404, "MANIFEST_UNKNOWN", true),
            of(404, "NAME_UNKNOWN", true),
            of(404, "BLOB_UNKNOWN", true),
            of(404, "", true),
            of(429, "", true),
            of(500, "", true),
            of(418, "", true),
        ];
        let kinds: Vec<Kind> = all.iter().map(|(kind, _)| *kind).collect();
        use Kind::{Internal, NotFound, PermissionDenied, Unauthenticated, Unavailable};
        let expected =
            [Unauthenticated, Unauthenticated, PermissionDenied, PermissionDenied, NotFound, NotFound, NotFound, NotFound, Unavailable, Unavailable, Internal];
        assert_eq!(kinds, expected);
        let words: std::collections::HashSet<&str> = all.iter().map(|(_, words)| *words).collect();
        assert_eq!(words.len(), all.len());
    }

    #[test]
    fn messages_are_short_and_on_one_line() {
        let said = Said::read(br#"{"errors":[{"code":"DENIED","message":"a\nb\u001b[31m"}]}"#).unwrap();
        assert_eq!(said.shown(), ", DENIED: ab[31m");
        let long = serde_json::json!({"error": "invalid_grant", "error_description": "x".repeat(10_000)}).to_string();
        assert!(Said::read(long.as_bytes()).unwrap().shown().len() < 300);
        assert_eq!(Said::read(b"{}").unwrap().shown(), "");
        assert!(Said::read(b"<html>").is_none());
    }
}
