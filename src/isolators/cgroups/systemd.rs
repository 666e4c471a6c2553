//! systemd over D-Bus: transient scopes for containers.
//!
//! systemd's own socket is tried first (it needs no message bus on the host), then the system bus.

mod limits;
mod peer;

use std::time::Duration;

use futures_util::StreamExt;
use zbus::connection::Builder;
use zbus::zvariant::{OwnedObjectPath, Value};
use zbus::{Connection, MatchRule, Message, MessageStream};

use self::limits::limits;
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::resources::Resources;

/// Where systemd listens itself.
const PRIVATE: &str = "/run/systemd/private";
const DESTINATION: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const INTERFACE: &str = "org.freedesktop.systemd1.Manager";
/// A job of systemd takes milliseconds; on a drowning host longer, but the kubelet's patience ends at two minutes.
const JOB_LIMIT: Duration = Duration::from_secs(30);

/// Properties of a unit, as D-Bus wants them.
type Properties = Vec<(&'static str, Value<'static>)>;

/// A connection. Made on first use and kept until it breaks: systemd drops it when it is upgraded.
#[derive(Clone)]
pub struct Systemd {
    connection: Connection,
    /// Talking to systemd itself, without a bus between: no names, no subscriptions.
    direct: bool,
}

fn failed(what: impl Into<String>) -> impl FnOnce(zbus::Error) -> Error {
    move |e| Error::with(Kind::Unavailable, what, e)
}

impl Systemd {
    /// Connects.
    ///
    /// # Errors
    /// `Unavailable` when neither socket answers.
    pub async fn connect() -> Result<Self> {
        if let Ok(stream) = tokio::net::UnixStream::connect(PRIVATE).await
            && let Ok(systemd) = Self::direct(stream).await
        {
            return Ok(systemd);
        }
        let connection = Connection::system().await.map_err(failed("connect to systemd"))?;
        let systemd = Self { connection, direct: false };
        // Without it systemd sends no JobRemoved over the bus.
        systemd.call("Subscribe", &()).await.map_err(failed("subscribe to systemd"))?;
        Ok(systemd)
    }

    /// Whether it broke.
    pub fn is_closed(&self) -> bool {
        self.connection.is_closed()
    }

    /// Speaks to a systemd (or a test's stand-in) at the other end of `stream`.
    pub(super) async fn direct(stream: tokio::net::UnixStream) -> Result<Self> {
        let stream = peer::renamed(stream).act("connect to", PRIVATE)?;
        let connection = Builder::unix_stream(stream).p2p().build().await.map_err(failed(format!("connect to {PRIVATE}")))?;
        Ok(Self { connection, direct: true })
    }

    async fn call<B>(&self, method: &str, body: &B) -> zbus::Result<Message>
    where
        B: serde::Serialize + zbus::zvariant::DynamicType + Sync,
    {
        let destination = (!self.direct).then_some(DESTINATION);
        self.connection.call_method(destination, PATH, Some(INTERFACE), method, body).await
    }

    /// Makes scope `name` in `slice` with process `pid` in it and waits until it stands.
    ///
    /// # Errors
    /// What systemd refused, or the job's result.
    pub async fn start_scope(&self, name: &str, slice: &str, description: &str, pid: u32, resources: &Resources, v2: bool) -> Result<()> {
        let what = format!("start scope {name} in {slice}");
        let mut properties: Properties = vec![
            ("Description", Value::from(description.to_owned())),
            ("Slice", Value::from(slice.to_owned())),
            ("PIDs", Value::from(vec![pid])),
            // The group below is ours: systemd neither moves processes in it nor resets what we set.
            ("Delegate", Value::from(true)),
            // Forget a failed scope as well, or its name is taken for ever.
            ("CollectMode", Value::from("inactive-or-failed")),
            // No ordering against shutdown targets: the kubelet ends containers.
            ("DefaultDependencies", Value::from(false)),
        ];
        properties.extend(limits(resources, v2));
        let auxiliary: Vec<(&str, Vec<(&str, Value<'static>)>)> = Vec::new();
        self.job(&what, "StartTransientUnit", &(name, "replace", properties, auxiliary)).await
    }

    /// Tells systemd the limits that it would otherwise set back when it reloads.
    ///
    /// # Errors
    /// What systemd refused.
    pub async fn set_limits(&self, name: &str, resources: &Resources, v2: bool) -> Result<()> {
        let runtime_only = true;
        self.call("SetUnitProperties", &(name, runtime_only, limits(resources, v2))).await.map(drop).map_err(failed(format!("set limits of {name}")))
    }

    /// Stops a unit: what is left in it dies. One that does not exist is fine.
    ///
    /// # Errors
    /// What systemd refused, or the job's result.
    pub async fn stop(&self, name: &str) -> Result<()> {
        match self.job(&format!("stop {name}"), "StopUnit", &(name, "replace")).await {
            Err(e) if is_unknown_unit(&e) => Ok(()),
            other => other,
        }
    }

    /// Names and descriptions of loaded units with such names.
    ///
    /// # Errors
    /// What systemd refused.
    pub async fn units(&self, pattern: &str) -> Result<Vec<(String, String)>> {
        type Unit = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);
        let states: Vec<&str> = Vec::new();
        let reply = self.call("ListUnitsByPatterns", &(states, vec![pattern])).await.map_err(failed("list units"))?;
        let units: Vec<Unit> = reply.body().deserialize().map_err(failed("read list of units"))?;
        Ok(units.into_iter().map(|u| (u.0, u.1)).collect())
    }

    /// Calls a method that starts a job and waits for its end. The signals are listened to before the call.
    async fn job<B>(&self, what: &str, method: &str, body: &B) -> Result<()>
    where
        B: serde::Serialize + zbus::zvariant::DynamicType + Sync,
    {
        let mut signals = if self.direct {
            MessageStream::from(&self.connection)
        } else {
            let rule = MatchRule::builder().msg_type(zbus::message::Type::Signal).interface(INTERFACE).and_then(|b| b.member("JobRemoved"));
            MessageStream::for_match_rule(rule.map_err(failed(what))?.build(), &self.connection, None).await.map_err(failed(what))?
        };
        let reply = self.call(method, body).await.map_err(failed(what))?;
        let job: OwnedObjectPath = reply.body().deserialize().map_err(failed(what))?;
        let ended = async {
            while let Some(message) = signals.next().await {
                let message = message.map_err(failed(what))?;
                if message.header().member().is_none_or(|m| m.as_str() != "JobRemoved") {
                    continue;
                }
                let (_, path, _, result): (u32, OwnedObjectPath, String, String) = message.body().deserialize().map_err(failed(what))?;
                if path == job {
                    return Ok(result);
                }
            }
            Err(Error::new(Kind::Unavailable, format!("{what}: systemd closed the connection")))
        };
        match tokio::time::timeout(JOB_LIMIT, ended).await {
            Err(_) => Err(Error::new(Kind::DeadlineExceeded, format!("{what}: no answer from systemd in {} s", JOB_LIMIT.as_secs()))),
            Ok(Ok(result)) if result == "done" => Ok(()),
            Ok(Ok(result)) => Err(Error::internal(format!("{what}: systemd says {result}"))),
            Ok(Err(e)) => Err(e),
        }
    }
}

/// `NoSuchUnit` anywhere in the chain.
fn is_unknown_unit(e: &Error) -> bool {
    let source = e.source.as_ref().and_then(|s| s.downcast_ref::<zbus::Error>());
    matches!(source, Some(zbus::Error::MethodError(name, ..)) if name.as_str() == "org.freedesktop.systemd1.NoSuchUnit")
}

#[cfg(test)]
mod tests;
