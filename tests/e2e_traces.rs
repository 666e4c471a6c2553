//! End to end: a daemon exports its calls and every step of a pod to an OpenTelemetry collector, whole and in one trace per call.

#![allow(clippy::unwrap_used)]

mod common;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use common::cri::{host_pod, shell};
use common::{Node, host};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::Span;
use tonic::{Request, Response, Status};

/// A collector: keeps what it gets, and which services it came from.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<(Vec<Span>, Vec<String>)>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(&self, request: Request<ExportTraceServiceRequest>) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut kept = self.0.lock().unwrap();
        for resource in request.into_inner().resource_spans {
            kept.1.push(resource.resource.map(|r| text(&r.attributes, "service.name")).unwrap_or_default());
            kept.0.extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    /// Listens in the network of the caller, in a thread of its own: the test's may wait for a daemon that waits for its collector.
    fn start() -> (Self, SocketAddr) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let collector = Self::default();
        let service = TraceServiceServer::new(collector.clone());
        std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
                let incoming = tokio_stream::wrappers::TcpListenerStream::new(tokio::net::TcpListener::from_std(listener).unwrap());
                tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
            });
        });
        (collector, address)
    }

    fn spans(&self) -> Vec<Span> {
        self.0.lock().unwrap().0.clone()
    }
}

/// An attribute's text, empty when there is none.
fn text(attributes: &[KeyValue], key: &str) -> String {
    let value = attributes.iter().find(|a| a.key == key).and_then(|a| a.value.clone()).and_then(|v| v.value);
    if let Some(Value::StringValue(text)) = value { text } else { String::new() }
}

fn attribute(span: &Span, key: &str) -> String {
    text(&span.attributes, key)
}

/// The only span with this name, pod and container.
fn one<'a>(spans: &'a [Span], name: &str, pod: &str, container: &str) -> &'a Span {
    let found: Vec<_> = spans.iter().filter(|s| s.name == name && attribute(s, "pod") == pod && attribute(s, "container") == container).collect();
    assert_eq!(found.len(), 1, "spans {name} of pod {pod:?}, container {container:?} among {:?}", spans.iter().map(|s| &s.name).collect::<Vec<_>>());
    found[0]
}

fn below(child: &Span, parent: &Span) {
    let names = format!("{} below {}", child.name, parent.name);
    assert_eq!(child.trace_id, parent.trace_id, "{names}: one trace");
    assert_eq!(child.parent_span_id, parent.span_id, "{names}");
    // Its end may come a moment later: who waits for the work need not wait for its task.
    assert!((parent.start_time_unix_nano..=parent.end_time_unix_nano).contains(&child.start_time_unix_nano), "{names}: begun in its time");
}

#[tokio::test(flavor = "current_thread")]
async fn calls_and_the_steps_of_pods_reach_a_collector() {
    let mut node = Node::prepare("");
    let (collector, address) = Collector::start();
    node.extra_config = format!("[tracing]\notlp_endpoint = \"http://{address}\"\n");
    node.start_registry();
    node.start_daemon(&[]);
    node.pull().await;
    let config = host_pod(&node, "p");
    let pod = node.run_pod(&config).await.unwrap();
    let container = node.launch(&pod, &config, &shell("c", "exec sleep 1000")).await;
    node.exec(&container, "true", 10).await.unwrap();
    node.stop_container(&container, 0).await.unwrap();
    node.remove_all_pods().await;

    // By itself, in the background, and the rest when the daemon leaves.
    host::wait_until("something was exported", || collector.spans().iter().any(|s| s.name == "run_pod_sandbox"));
    node.terminate_daemon();
    let spans = collector.spans();
    assert!(collector.0.lock().unwrap().1.iter().all(|service| service == "mesocri"));
    for span in &spans {
        assert!(attribute(span, "target").starts_with("mesocri::"), "a span of somebody else's: {span:?}");
    }

    let call = one(&spans, "run_pod_sandbox", &pod, "");
    assert!(call.parent_span_id.is_empty(), "a call begins a trace");
    let made = one(&spans, "pod.make", &pod, "");
    below(made, call);
    for step in ["start_shim", "prepare", "create_sandbox"] {
        below(spans.iter().find(|s| s.name == step && attribute(s, "pod") == pod).unwrap(), made);
    }
    let prepare = one(&spans, "prepare", &pod, "");
    let mut isolators: Vec<_> = spans.iter().filter(|s| s.parent_span_id == prepare.span_id).map(|s| attribute(s, "isolator")).collect();
    isolators.sort();
    let mut all = mesocri::isolators::default_isolation();
    all.sort();
    assert_eq!(isolators, all);

    let make = one(&spans, "container.make", &pod, &container);
    below(make, spans.iter().find(|s| s.name == "create_container").unwrap());
    for step in ["provision", "prepare", "create_task", "isolate"] {
        below(one(&spans, step, &pod, &container), make);
    }
    for (act, call) in [("container.start", "start_container"), ("container.exec", "exec_sync"), ("container.stop", "stop_container")] {
        below(one(&spans, act, &pod, &container), one(&spans, call, &pod, &container));
    }
    below(one(&spans, "start_task", &pod, &container), one(&spans, "container.start", &pod, &container));
    below(one(&spans, "kill", &pod, &container), one(&spans, "container.stop", &pod, &container));
    assert!(one(&spans, "container.exit", &pod, &container).parent_span_id.is_empty());
    for (act, step) in [("pod.stop", "stop_sandbox"), ("pod.remove", "erase")] {
        below(one(&spans, step, &pod, ""), one(&spans, act, &pod, ""));
    }
    assert!(one(&spans, "recover", "", "").parent_span_id.is_empty());

    // The ordinary log has the acts, with their ids, and not the steps.
    let log = node.daemon_log();
    assert!(!log.contains("create_sandbox{"), "{log}");
    node.finish();
}
