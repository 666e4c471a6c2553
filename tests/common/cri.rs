//! Short forms of CRI calls for tests: configurations with sensible parts, and whole sequences.

use mesocri::wire::cri as api;
use tonic::{Code, Status};

use super::{BUSYBOX, Node};

/// A pod's configuration: private network and process namespaces.
pub fn pod(node: &Node, name: &str) -> api::PodSandboxConfig {
    api::PodSandboxConfig {
        metadata: Some(api::PodSandboxMetadata { name: name.to_owned(), uid: format!("uid-{name}"), namespace: "e2e".to_owned(), attempt: 0 }),
        hostname: name.to_owned(),
        log_directory: node.logs().join(name).display().to_string(),
        labels: [("app".to_owned(), name.to_owned())].into(),
        linux: Some(api::LinuxPodSandboxConfig {
            security_context: Some(api::LinuxSandboxSecurityContext {
                namespace_options: Some(api::NamespaceOption { pid: api::NamespaceMode::Container.into(), ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The same on the host's network.
pub fn host_pod(node: &Node, name: &str) -> api::PodSandboxConfig {
    let mut config = pod(node, name);
    config.hostname = String::new();
    if let Some(options) = config.linux.as_mut().and_then(|l| l.security_context.as_mut()).and_then(|s| s.namespace_options.as_mut()) {
        options.network = api::NamespaceMode::Node.into();
    }
    config
}

/// A container's configuration that runs a shell script.
pub fn shell(name: &str, script: &str) -> api::ContainerConfig {
    api::ContainerConfig {
        metadata: Some(api::ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(api::ImageSpec { image: BUSYBOX.to_owned(), ..Default::default() }),
        command: vec!["/bin/sh".to_owned(), "-c".to_owned(), script.to_owned()],
        log_path: format!("{name}.log"),
        linux: Some(api::LinuxContainerConfig {
            security_context: Some(api::LinuxContainerSecurityContext {
                namespace_options: Some(api::NamespaceOption { pid: api::NamespaceMode::Container.into(), ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

impl Node {
    /// Pulls the bench's image.
    pub async fn pull(&self) -> String {
        let request = api::PullImageRequest { image: Some(api::ImageSpec { image: BUSYBOX.to_owned(), ..Default::default() }), ..Default::default() };
        self.images().pull_image(request).await.unwrap().into_inner().image_ref
    }

    /// RunPodSandbox.
    pub async fn run_pod(&self, config: &api::PodSandboxConfig) -> Result<String, Status> {
        self.run_pod_on("", config).await
    }

    /// RunPodSandbox under a runtime handler.
    pub async fn run_pod_on(&self, handler: &str, config: &api::PodSandboxConfig) -> Result<String, Status> {
        let request = api::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_owned() };
        Ok(self.runtime().run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
    }

    /// CreateContainer.
    pub async fn create(&self, pod: &str, pod_config: &api::PodSandboxConfig, config: &api::ContainerConfig) -> Result<String, Status> {
        let request = api::CreateContainerRequest { pod_sandbox_id: pod.to_owned(), config: Some(config.clone()), sandbox_config: Some(pod_config.clone()) };
        Ok(self.runtime().create_container(request).await?.into_inner().container_id)
    }

    /// StartContainer.
    pub async fn start_container(&self, id: &str) -> Result<(), Status> {
        self.runtime().start_container(api::StartContainerRequest { container_id: id.to_owned() }).await.map(|_| ())
    }

    /// CreateContainer and StartContainer, both of which must work.
    pub async fn launch(&self, pod: &str, pod_config: &api::PodSandboxConfig, config: &api::ContainerConfig) -> String {
        let id = self.create(pod, pod_config, config).await.unwrap();
        self.start_container(&id).await.unwrap();
        id
    }

    /// StopContainer.
    pub async fn stop_container(&self, id: &str, seconds: i64) -> Result<(), Status> {
        self.runtime().stop_container(api::StopContainerRequest { container_id: id.to_owned(), timeout: seconds }).await.map(|_| ())
    }

    /// RemoveContainer.
    pub async fn remove_container(&self, id: &str) -> Result<(), Status> {
        self.runtime().remove_container(api::RemoveContainerRequest { container_id: id.to_owned() }).await.map(|_| ())
    }

    /// PullImage of any name.
    pub async fn pull_named(&self, name: &str) -> Result<String, Status> {
        let request = api::PullImageRequest { image: Some(api::ImageSpec { image: name.to_owned(), ..Default::default() }), ..Default::default() };
        Ok(self.images().pull_image(request).await?.into_inner().image_ref)
    }

    /// StopPodSandbox.
    pub async fn stop_pod(&self, id: &str) -> Result<(), Status> {
        self.runtime().stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() }).await.map(|_| ())
    }

    /// StopPodSandbox and RemovePodSandbox.
    pub async fn remove_pod(&self, id: &str) -> Result<(), Status> {
        self.runtime().stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() }).await?;
        self.runtime().remove_pod_sandbox(api::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() }).await.map(|_| ())
    }

    /// Removes every pod.
    pub async fn remove_all_pods(&self) {
        for pod in self.pods().await {
            self.remove_pod(&pod.id).await.unwrap();
        }
        assert!(self.pods().await.is_empty());
        assert!(self.containers().await.is_empty());
    }

    /// ListPodSandbox.
    pub async fn pods(&self) -> Vec<api::PodSandbox> {
        self.runtime().list_pod_sandbox(api::ListPodSandboxRequest { filter: None }).await.unwrap().into_inner().items
    }

    /// ListContainers.
    pub async fn containers(&self) -> Vec<api::Container> {
        self.runtime().list_containers(api::ListContainersRequest { filter: None }).await.unwrap().into_inner().containers
    }

    /// ContainerStatus.
    pub async fn status(&self, id: &str) -> Result<api::ContainerStatus, Status> {
        Ok(self.runtime().container_status(api::ContainerStatusRequest { container_id: id.to_owned(), verbose: false }).await?.into_inner().status.unwrap())
    }

    /// ContainerStatus with the number of the first process; 0 when none lives.
    pub async fn process_of(&self, id: &str) -> Result<(u32, api::ContainerStatus), Status> {
        let answer = self.runtime().container_status(api::ContainerStatusRequest { container_id: id.to_owned(), verbose: true }).await?.into_inner();
        let info: serde_json::Value = serde_json::from_str(&answer.info["info"]).unwrap();
        Ok((info["pid"].as_u64().unwrap().try_into().unwrap(), answer.status.unwrap()))
    }

    /// PodSandboxStatus.
    pub async fn pod_status(&self, id: &str) -> Result<api::PodSandboxStatus, Status> {
        Ok(self
            .runtime()
            .pod_sandbox_status(api::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false })
            .await?
            .into_inner()
            .status
            .unwrap())
    }

    /// ExecSync of a shell script: exit code, standard output, standard error.
    pub async fn exec(&self, id: &str, script: &str, timeout: i64) -> Result<(i32, String, String), Status> {
        let cmd = vec!["/bin/sh".to_owned(), "-c".to_owned(), script.to_owned()];
        let answer = self.runtime().exec_sync(api::ExecSyncRequest { container_id: id.to_owned(), cmd, timeout }).await?.into_inner();
        Ok((answer.exit_code, String::from_utf8_lossy(&answer.stdout).into_owned(), String::from_utf8_lossy(&answer.stderr).into_owned()))
    }

    /// Waits until the container has ended and gives its status. Polls as a kubelet does.
    pub async fn wait_exit(&self, id: &str) -> api::ContainerStatus {
        let start = std::time::Instant::now();
        loop {
            let status = self.status(id).await.unwrap();
            if status.state == api::ContainerState::ContainerExited as i32 {
                return status;
            }
            assert!(start.elapsed() < std::time::Duration::from_secs(30), "{id} has not ended: {status:?}");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }

    /// Waits until the container has printed `line`: it has come so far.
    pub async fn until_printed(&self, id: &str, line: &str) {
        let path = self.status(id).await.unwrap().log_path;
        // Not by [`parse_log`]: the last line may be half written.
        let printed = || std::fs::read_to_string(&path).is_ok_and(|text| text.contains(&format!(" F {line}\n")));
        let start = std::time::Instant::now();
        while !printed() {
            assert!(start.elapsed() < std::time::Duration::from_secs(30), "{id} never prints {line:?}: {:?}", self.status(id).await);
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }

    /// The container's log without headers: `(stdout, stderr)`.
    pub async fn log(&self, id: &str) -> (String, String) {
        let path = self.status(id).await.unwrap().log_path;
        parse_log(&std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {path}: {e}")))
    }
}

/// Splits a CRI log into its two streams (cri-behaviour: partial lines are joined, full ones end in a newline).
pub fn parse_log(text: &str) -> (String, String) {
    let mut streams = (String::new(), String::new());
    for line in text.lines() {
        let mut fields = line.splitn(4, ' ');
        let (time, stream, tag, content) = (fields.next().unwrap(), fields.next().unwrap(), fields.next().unwrap(), fields.next().unwrap_or_default());
        assert!(time.ends_with('Z') && time.len() == "2016-10-06T00:17:09.669794202Z".len(), "malformed time {time:?}");
        let target = if stream == "stdout" { &mut streams.0 } else { &mut streams.1 };
        target.push_str(content);
        if tag == "F" {
            target.push('\n');
        }
    }
    streams
}

/// The code of a failed call; `Ok` for one that worked.
pub fn code<T>(result: Result<T, Status>) -> Code {
    result.map_or_else(|s| s.code(), |_| Code::Ok)
}
