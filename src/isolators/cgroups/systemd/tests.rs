//! Against a stand-in for systemd at the other end of a socket pair.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use zbus::object_server::SignalEmitter;
use zbus::zvariant::{ObjectPath, OwnedValue};

use super::*;

/// Records calls and ends every job with `result`.
struct StandIn {
    calls: Arc<Mutex<Vec<String>>>,
    properties: Arc<Mutex<HashMap<String, OwnedValue>>>,
    result: &'static str,
}

impl StandIn {
    async fn end_job(&self, emitter: &SignalEmitter<'_>, unit: &str, call: String) -> OwnedObjectPath {
        self.calls.lock().unwrap().push(call);
        // Another job's end first: it must not be taken for ours. And ours before the answer: it must not be missed.
        for (id, result) in [(6, "failed"), (7, self.result)] {
            let path = ObjectPath::try_from(format!("{PATH}/job/{id}")).unwrap();
            Self::job_removed(emitter, id, path, unit, result).await.unwrap();
        }
        OwnedObjectPath::try_from(format!("{PATH}/job/7")).unwrap()
    }
}

#[zbus::interface(name = "org.freedesktop.systemd1.Manager")]
impl StandIn {
    async fn start_transient_unit(
        &self,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
        name: String,
        mode: String,
        properties: Vec<(String, OwnedValue)>,
        _auxiliary: Vec<(String, Vec<(String, OwnedValue)>)>,
    ) -> OwnedObjectPath {
        self.properties.lock().unwrap().extend(properties);
        self.end_job(&emitter, &name, format!("start {name} {mode}")).await
    }

    async fn stop_unit(&self, #[zbus(signal_emitter)] emitter: SignalEmitter<'_>, name: String, mode: String) -> zbus::fdo::Result<OwnedObjectPath> {
        Ok(self.end_job(&emitter, &name, format!("stop {name} {mode}")).await)
    }

    fn set_unit_properties(&self, name: String, runtime: bool, properties: Vec<(String, OwnedValue)>) {
        self.calls.lock().unwrap().push(format!("set {name} {runtime}"));
        self.properties.lock().unwrap().extend(properties);
    }

    #[zbus(signal)]
    async fn job_removed(emitter: &SignalEmitter<'_>, id: u32, job: ObjectPath<'_>, unit: &str, result: &str) -> zbus::Result<()>;
}

struct Bench {
    systemd: Systemd,
    calls: Arc<Mutex<Vec<String>>>,
    properties: Arc<Mutex<HashMap<String, OwnedValue>>>,
    _server: Connection,
}

async fn bench(result: &'static str) -> Bench {
    let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
    let (calls, properties) = (Arc::default(), Arc::default());
    let stand_in = StandIn { calls: Arc::clone(&calls), properties: Arc::clone(&properties), result };
    let server = Builder::unix_stream(theirs).server(zbus::Guid::generate()).unwrap().p2p().serve_at(PATH, stand_in).unwrap().build();
    let (systemd, server) = tokio::join!(Systemd::direct(ours), server);
    Bench { systemd: systemd.unwrap(), calls, properties, _server: server.unwrap() }
}

#[tokio::test]
async fn a_scope_is_started_with_its_limits() {
    let b = bench("done").await;
    let r = Resources {
        memory_limit: Some(100),
        memory_swap: Some(150),
        cpu_shares: Some(1024),
        cpu_quota: Some(50_000),
        pids_limit: Some(5),
        cpuset_cpus: Some("0,3".to_owned()),
        ..Resources::default()
    };
    b.systemd.start_scope("mesocri-x.scope", "a.slice", "d", 42, &r, true).await.unwrap();
    assert_eq!(*b.calls.lock().unwrap(), ["start mesocri-x.scope replace"]);
    let p = b.properties.lock().unwrap();
    assert_eq!(Vec::<u32>::try_from(p["PIDs"].try_clone().unwrap()).unwrap(), [42]);
    assert_eq!(bool::try_from(&p["Delegate"]), Ok(true));
    assert_eq!(<&str>::try_from(&p["Slice"]), Ok("a.slice"));
    assert_eq!(Vec::<u8>::try_from(p["AllowedCPUs"].try_clone().unwrap()).unwrap(), [0b1001]);
    for (name, value) in [("MemoryMax", 100), ("MemorySwapMax", 50), ("CPUWeight", 100), ("CPUQuotaPerSecUSec", 500_000), ("TasksMax", 5)] {
        assert_eq!(u64::try_from(&p[name]), Ok(value), "{name}");
    }
}

#[tokio::test]
async fn a_failed_job_is_an_error_that_names_it() {
    let b = bench("timeout").await;
    let e = b.systemd.start_scope("s.scope", "a.slice", "d", 1, &Resources::default(), false).await.unwrap_err();
    assert_eq!(e.to_string(), "start scope s.scope in a.slice: systemd says timeout");
}

#[tokio::test]
async fn stop_and_update() {
    let b = bench("done").await;
    b.systemd.stop("s.scope").await.unwrap();
    b.systemd.set_limits("s.scope", &Resources { memory_limit: Some(-1), ..Resources::default() }, false).await.unwrap();
    assert_eq!(*b.calls.lock().unwrap(), ["stop s.scope replace", "set s.scope true"]);
    for name in ["MemoryLimit", "TasksMax"] {
        assert_eq!(u64::try_from(&b.properties.lock().unwrap()[name]), Ok(u64::MAX), "{name}");
    }
    // A method that the stand-in does not have is an error, not a hang.
    assert!(b.systemd.units("x").await.is_err());
}
