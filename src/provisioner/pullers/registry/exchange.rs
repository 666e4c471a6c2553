//! One question to one host: redirects followed, the registry's demand for credentials answered.
//!
//! What is secret (authorization, the host's own headers, our certificate) goes to the host it is for and nowhere else: after a
//! redirect to another origin none of it is sent, and a demand for credentials from there is not answered.

use std::sync::{Mutex, OnceLock, PoisonError};

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION, WWW_AUTHENTICATE};
use reqwest::{Client, Method, Response, StatusCode, Url};

use super::answer::{broken, refusal};
use super::client::{Clients, Trust, may_send};
use super::hosts::{Host, authority};
use super::retry::Failure;
use crate::model::error::{Error, Kind, Result};
use crate::provisioner::pullers::auth::{Asking, Keys, Tokens, challenge};

/// Redirects followed for one request: registries send blobs to one storage host, which may move once more.
const MAX_REDIRECTS: usize = 5;
/// Times one request is repeated with other credentials: a token may run out and its successor be revoked.
const MAX_ANSWERS: usize = 2;

/// A request.
pub struct Outgoing<'a> {
    /// GET, HEAD or POST.
    pub method: Method,
    /// Where to.
    pub url: Url,
    /// For this origin alone.
    pub own: HeaderMap,
    /// For whoever answers in the end.
    pub common: HeaderMap,
    /// For this origin alone; a request with one is not redirected.
    pub body: Option<String>,
    /// For this origin.
    pub client: Client,
    /// Towards this origin.
    pub trust: &'a Trust,
}

/// An answer.
pub struct Arrived {
    /// Of any status.
    pub response: Response,
    /// The origin that was asked gave it, not one it sent us to.
    pub own: bool,
}

/// Sends a request and follows where it leads.
///
/// # Errors
/// `Unavailable` when a connection fails, `PermissionDenied` for redirects that may not be followed.
pub async fn send(clients: &Clients, out: Outgoing<'_>, act: &str) -> Result<Arrived, Failure> {
    let origin = out.url.origin();
    let mut url = out.url.clone();
    let mut own = true;
    let mut client = out.client.clone();
    for _ in 0..=MAX_REDIRECTS {
        let mut request = client.request(out.method.clone(), url.clone()).headers(out.common.clone());
        if own {
            request = request.headers(out.own.clone());
            if let Some(body) = &out.body {
                request = request.body(body.clone());
            }
        }
        let response = request.send().await.map_err(|e| broken(&sent_on(act, own, &url), e))?;
        let target = response.headers().get(LOCATION).filter(|_| response.status().is_redirection()).and_then(|v| v.to_str().ok());
        let Some(target) = target.filter(|_| out.body.is_none()) else { return Ok(Arrived { response, own }) };
        let next = url.join(target).map_err(|_| Error::new(Kind::PermissionDenied, format!("{act}: redirected to what is no URL")))?;
        may_send(&url, &next).map_err(|e| e.within(act))?;
        url = next;
        // Coming back to the origin does not make the path to it trustworthy.
        own = own && url.origin() == origin;
        if !own {
            client = clients.get(&out.trust.elsewhere(), &url)?;
        }
    }
    Err(Failure::lasting(Error::new(Kind::PermissionDenied, format!("{act}: redirected more than {MAX_REDIRECTS} times"))))
}

fn sent_on(act: &str, own: bool, url: &Url) -> String {
    if own { act.to_owned() } else { format!("{act}, sent on to {}", authority(url)) }
}

/// One host, for one repository, during one pull.
pub struct Session {
    /// It.
    pub host: Host,
    repository: String,
    keys: Keys,
    client: OnceLock<Client>,
    authorization: Mutex<Option<HeaderValue>>,
}

impl Session {
    /// Nothing is sent yet.
    pub fn new(host: Host, repository: &str, keys: Keys) -> Self {
        Self { host, repository: repository.to_owned(), keys, client: OnceLock::new(), authorization: Mutex::new(None) }
    }

    /// Asks for what lies at `path` below the repository; an answer other than success is a failure. Tokens run out during long
    /// pulls: whenever the registry asks, it is answered.
    ///
    /// # Errors
    /// As [`crate::provisioner::Images::pull`].
    pub async fn ask(&self, shared: (&Clients, &Tokens), method: Method, path: &str, common: HeaderMap, act: &str) -> Result<Response, Failure> {
        let mut url = self.host.base.clone();
        url.set_path(&format!("{}/{}/{path}", self.host.base.path().trim_end_matches('/'), self.repository));
        self.ask_at(shared, method, &url, common, act).await
    }

    /// The same for any URL of this host.
    ///
    /// # Errors
    /// As [`Session::ask`].
    pub async fn ask_at(&self, shared: (&Clients, &Tokens), method: Method, url: &Url, common: HeaderMap, act: &str) -> Result<Response, Failure> {
        let (clients, tokens) = shared;
        let client = match self.client.get() {
            Some(client) => client.clone(),
            None => {
                let made = clients.get(&self.host.trust, url)?;
                self.client.get_or_init(|| made).clone()
            }
        };
        let mut answers = 0;
        loop {
            let sent = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let mut own = self.host.headers.clone();
            if let Some(value) = &sent {
                own.insert(AUTHORIZATION, value.clone());
            }
            let out =
                Outgoing { method: method.clone(), url: url.clone(), own, common: common.clone(), body: None, client: client.clone(), trust: &self.host.trust };
            let arrived = send(clients, out, act).await?;
            let response = arrived.response;
            if response.status().is_success() {
                return Ok(response);
            }
            if response.status() != StatusCode::UNAUTHORIZED || !arrived.own || answers == MAX_ANSWERS {
                return Err(refusal(response, act, sent.is_some(), false).await);
            }
            answers += 1;
            // Another request of this pull may have got a new token meanwhile.
            let now = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if now != sent {
                continue;
            }
            let challenge = challenge(response.headers().get_all(WWW_AUTHENTICATE).iter());
            let asking = Asking { host: &self.host, repository: &self.repository, challenge, refused: sent.as_ref() };
            match asking.answer(&self.keys, clients, tokens).await? {
                Some(value) if Some(&value) != sent.as_ref() => *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(value),
                // The same again would be refused again.
                _ => return Err(refusal(response, act, sent.is_some(), false).await),
            }
        }
    }
}

/// The media type of an answer, as it came.
pub fn media_type(response: &Response) -> Option<String> {
    response.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).map(str::to_owned)
}
