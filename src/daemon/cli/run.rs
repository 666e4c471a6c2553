//! `mesocri run` and `mesocri ping`: clients of the daemon's own sockets, through the same calls a kubelet makes.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::ArgMatches;
use hyper_util::rt::TokioIo;
use tokio_stream::StreamExt as _;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::sample;
use super::show::{Show, short};
use crate::model::error::{Act as _, Error, Kind, Result};
use crate::wire::cri::runtime_service_client::RuntimeServiceClient;
use crate::wire::cri::{self as api};
use crate::wire::operator::operator_client::OperatorClient;
use crate::wire::operator::{LoadRequest, PullRequest, pull_progress::Event};

/// Name under which the stand-in image is imported when no registry can be reached.
const SAMPLE: &str = "localhost/mesocri-busybox:host";

/// Between two tries of `ping --wait`.
const PING_INTERVAL: Duration = Duration::from_millis(20);

type Cri = RuntimeServiceClient<Channel>;

/// `mesocri ping`: ready means that it answers Status, which it does only after recovery.
pub async fn ping(path: &Path, wait: Duration) -> Result<ExitCode> {
    let deadline = tokio::time::Instant::now() + wait;
    loop {
        let answer = async {
            let channel = connect(path).await?;
            RuntimeServiceClient::new(channel).status(api::StatusRequest { verbose: false }).await.map_err(|s| refused("ask for the status", &s))
        };
        match answer.await {
            Ok(_) => return Ok(ExitCode::SUCCESS),
            Err(e) if tokio::time::Instant::now() >= deadline => return Err(e),
            // Nothing announces a socket that does not exist yet.
            Err(_) => tokio::time::sleep(PING_INTERVAL).await,
        }
    }
}

/// `mesocri run IMAGE [-- CMD..]`.
pub async fn run(matches: &ArgMatches) -> Result<ExitCode> {
    let channel = connect(&super::address(matches)).await?;
    let mut show = Show::new(matches.get_flag("quiet"));
    let text = |name: &str| matches.get_one::<String>(name).cloned().unwrap_or_default();
    let image = fetch(&channel, &text("image"), &mut show).await?;

    let mut cri = RuntimeServiceClient::new(channel);
    let logs = tempfile::Builder::new().prefix("mesocri-run-").tempdir().act("create", "a directory for the log")?;
    let config = pod_config(logs.path(), &text("network"));
    let request = api::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
    let pod = cri.run_pod_sandbox(request).await.map_err(|s| refused("run the pod", &s))?.into_inner().pod_sandbox_id;
    let outcome = tokio::select! {
        outcome = run_in(&mut cri, &show, &pod, config, container_config(matches, image)?, logs.path()) => outcome,
        _ = tokio::signal::ctrl_c() => Err(Error::new(Kind::Cancelled, "run: interrupted")),
    };
    // The pod goes whatever happened in it.
    let stopped = cri.stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await.map_err(|s| refused("stop the pod", &s));
    let removed = cri.remove_pod_sandbox(api::RemovePodSandboxRequest { pod_sandbox_id: pod.clone() }).await.map_err(|s| refused("remove the pod", &s));
    let code = outcome?;
    stopped?;
    removed?;
    show.line(format_args!("pod {} is removed", short(&pod)));
    Ok(ExitCode::from(code))
}

/// Pulls with progress; where no registry can be reached, the host's own busybox stands in, said aloud.
async fn fetch(channel: &Channel, image: &str, show: &mut Show) -> Result<String> {
    let mut operator = OperatorClient::new(channel.clone());
    show.line(format_args!("pull {image}"));
    let pulled = async {
        let mut stream = operator.pull(PullRequest { image: image.to_owned() }).await?.into_inner();
        let mut id = None;
        while let Some(step) = stream.next().await {
            let Some(event) = step?.event else { continue };
            if let Event::ImageId(image) = &event {
                id = Some(image.clone());
            }
            show.pull(event);
        }
        id.ok_or_else(|| Status::internal("the daemon ended the pull without an image"))
    };
    match pulled.await {
        Ok(id) => Ok(id),
        Err(s) if s.code() == Code::Unavailable => {
            show.line(format_args!("{}", s.message()));
            show.line("no registry can be reached: making an image of this host's busybox and running that");
            let dir = tempfile::tempdir().act("create", "a directory for the archive")?;
            let archive = dir.path().join("busybox.tar");
            sample::write_archive(&archive, SAMPLE)?;
            let ids = import(channel, &archive).await?;
            let id = ids.into_iter().next().ok_or_else(|| Error::internal("import the host's busybox: the daemon named no image"))?;
            show.line(format_args!("image {} {SAMPLE}", short(&id)));
            Ok(id)
        }
        Err(s) => Err(refused("pull the image", &s)),
    }
}

pub(super) async fn import(channel: &Channel, archive: &Path) -> Result<Vec<String>> {
    let request = LoadRequest { path: archive.display().to_string() };
    let answer = OperatorClient::new(channel.clone()).load(request).await.map_err(|s| refused("load the archive", &s))?;
    Ok(answer.into_inner().image_ids)
}

/// Creates and starts the container, copies its log out until it has ended, and says how.
async fn run_in(cri: &mut Cri, show: &Show, pod: &str, pod_config: api::PodSandboxConfig, config: api::ContainerConfig, logs: &Path) -> Result<u8> {
    let status = cri
        .pod_sandbox_status(api::PodSandboxStatusRequest { pod_sandbox_id: pod.to_owned(), verbose: false })
        .await
        .map_err(|s| refused("ask for the pod", &s))?;
    let ip = status.into_inner().status.and_then(|s| s.network).map(|n| n.ip).filter(|ip| !ip.is_empty());
    show.line(format_args!("pod {} is ready{}", short(pod), ip.map_or_else(String::new, |ip| format!(" at {ip}"))));

    // Subscribed before the start, so that no exit can be missed.
    let mut events = cri.get_container_events(api::GetEventsRequest {}).await.map_err(|s| refused("watch events", &s))?.into_inner();
    let request = api::CreateContainerRequest { pod_sandbox_id: pod.to_owned(), config: Some(config), sandbox_config: Some(pod_config) };
    let id = cri.create_container(request).await.map_err(|s| refused("create the container", &s))?.into_inner().container_id;
    show.line(format_args!("container {} is created", short(&id)));
    cri.start_container(api::StartContainerRequest { container_id: id.clone() }).await.map_err(|s| refused("start the container", &s))?;
    show.line(format_args!("container {} is running", short(&id)));

    let log = logs.join("run.log");
    let mut copied = 0;
    let mut tick = tokio::time::interval(Duration::from_millis(50));
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(e)) if e.container_id == id && e.container_event_type == api::ContainerEventType::ContainerStoppedEvent as i32 => break,
                Some(Ok(_)) => {}
                Some(Err(s)) => return Err(refused("watch events", &s)),
                None => return Err(Error::new(Kind::Unavailable, "watch events: the daemon left")),
            },
            // The log of a running container is followed at a reader's pace.
            _ = tick.tick() => copied = copy_log(&log, copied)?,
        }
    }
    copy_log(&log, copied)?;
    let status = cri
        .container_status(api::ContainerStatusRequest { container_id: id.clone(), verbose: false })
        .await
        .map_err(|s| refused("ask for the container", &s))?;
    let status = status.into_inner().status.unwrap_or_default();
    show.line(format_args!("container {} has ended: exit code {}, {}", short(&id), status.exit_code, status.reason));
    Ok(u8::try_from(status.exit_code).unwrap_or(255))
}

/// Prints what the log has beyond `from` bytes, without its CRI line headers; returns where it ended (whole lines only).
fn copy_log(log: &Path, from: usize) -> Result<usize> {
    use std::io::Write as _;
    let bytes = match std::fs::read(log) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(from),
        Err(e) => return Err(Error::io(format!("read {}", log.display()), e)),
    };
    let mut at = from;
    for line in bytes[from..].split_inclusive(|b| *b == b'\n') {
        if line.last() != Some(&b'\n') {
            break;
        }
        at += line.len();
        // TIME STREAM TAG CONTENT
        let mut fields = line.splitn(4, |b| *b == b' ');
        let (_, stream, tag, content) = (fields.next(), fields.next(), fields.next(), fields.next().unwrap_or_default());
        let content = if tag == Some(b"P") { &content[..content.len() - 1] } else { content };
        let written = if stream == Some(b"stderr") { std::io::stderr().write_all(content) } else { std::io::stdout().write_all(content) };
        written.act("write", "the container's output")?;
    }
    std::io::stdout().flush().act("write", "the container's output")?;
    Ok(at)
}

fn pod_config(logs: &Path, network: &str) -> api::PodSandboxConfig {
    let id = short(crate::model::PodId::random().as_str()).to_owned();
    let mode = if network == "host" { api::NamespaceMode::Node } else { api::NamespaceMode::Pod };
    api::PodSandboxConfig {
        metadata: Some(api::PodSandboxMetadata { name: format!("run-{id}"), uid: id.clone(), namespace: "mesocri-run".to_owned(), attempt: 0 }),
        hostname: if network == "host" { String::new() } else { format!("run-{id}") },
        log_directory: logs.display().to_string(),
        linux: Some(api::LinuxPodSandboxConfig {
            security_context: Some(api::LinuxSandboxSecurityContext {
                namespace_options: Some(api::NamespaceOption { network: mode.into(), pid: api::NamespaceMode::Container.into(), ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn container_config(matches: &ArgMatches, image: String) -> Result<api::ContainerConfig> {
    let many = |name: &str| matches.get_many::<String>(name).map(|v| v.cloned().collect::<Vec<_>>()).unwrap_or_default();
    let mut mounts = Vec::new();
    for text in many("mount") {
        let mut parts = text.split(':');
        let (Some(host), Some(inside), mode, None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            return Err(Error::invalid(format!("parse --mount {text}: expected HOST:CONTAINER[:ro]")));
        };
        let readonly = match mode {
            None => false,
            Some("ro") => true,
            Some(other) => return Err(Error::invalid(format!("parse --mount {text}: {other:?} is not ro"))),
        };
        mounts.push(api::Mount { host_path: host.to_owned(), container_path: inside.to_owned(), readonly, ..Default::default() });
    }
    let mut envs = Vec::new();
    for text in many("env") {
        let (key, value) = text.split_once('=').ok_or_else(|| Error::invalid(format!("parse --env {text}: expected NAME=VALUE")))?;
        envs.push(api::KeyValue { key: key.to_owned(), value: value.as_bytes().to_vec() });
    }
    let namespaces = api::NamespaceOption { pid: api::NamespaceMode::Container.into(), ..Default::default() };
    Ok(api::ContainerConfig {
        linux: Some(api::LinuxContainerConfig {
            security_context: Some(api::LinuxContainerSecurityContext { namespace_options: Some(namespaces), ..Default::default() }),
            ..Default::default()
        }),
        metadata: Some(api::ContainerMetadata { name: "run".to_owned(), attempt: 0 }),
        image: Some(api::ImageSpec { image, ..Default::default() }),
        command: many("command"),
        envs,
        mounts,
        log_path: "run.log".to_owned(),
        ..Default::default()
    })
}

pub(super) async fn connect(path: &Path) -> Result<Channel> {
    let owned = path.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = owned.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::try_from("http://localhost").map_err(|e| Error::with(Kind::Internal, "make an endpoint", e))?;
    endpoint
        .connect_with_connector(connector)
        .await
        .map_err(|e| Error::with(Kind::Unavailable, format!("connect to the daemon at {} (is `mesocri daemon` running?)", path.display()), e))
}

pub(super) fn refused(act: &str, status: &Status) -> Error {
    let kind = match status.code() {
        Code::InvalidArgument => Kind::InvalidArgument,
        Code::NotFound => Kind::NotFound,
        Code::Unavailable => Kind::Unavailable,
        Code::FailedPrecondition => Kind::FailedPrecondition,
        Code::ResourceExhausted => Kind::ResourceExhausted,
        Code::DataLoss => Kind::DataLoss,
        _ => Kind::Internal,
    };
    Error::new(kind, format!("{act}: {}", status.message()))
}
