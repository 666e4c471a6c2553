//! Logs and traces: `tracing` to standard error (text or JSON), spans to an OTLP collector when one is configured.
//!
//! `log.level` decides what is logged and nothing else: a collector gets every call and every step of a pod ([`traced`]).

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use super::config::{Log, Tracing};
use crate::model::error::{Error, Result};

/// Keeps the exporter alive; dropping it sends what is left.
#[derive(Default)]
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(provider) = self.provider.take() {
            // The collector may be gone; there is nobody left to tell.
            let _ = provider.shutdown();
        }
    }
}

/// Sets up logs and traces for the process. Call once, inside the runtime.
///
/// # Errors
/// `InvalidArgument` for a malformed filter, format or endpoint.
pub fn start(log: &Log, traces: &Tracing) -> Result<Telemetry> {
    let filter = EnvFilter::try_new(&log.level).map_err(|e| Error::invalid(format!("parse log.level {:?}: {e}", log.level)))?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match log.format.as_str() {
        "text" => lines.with_ansi(false).boxed(),
        "json" => lines.json().boxed(),
        other => return Err(Error::invalid(format!("parse log.format {other:?}: expected text or json"))),
    };
    let mut telemetry = Telemetry::default();
    let exporter = if traces.otlp_endpoint.is_empty() {
        None
    } else {
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_endpoint(&traces.otlp_endpoint)
            .build()
            .map_err(|e| Error::invalid(format!("set up trace export to {}: {e}", traces.otlp_endpoint)))?;
        let resource = opentelemetry_sdk::Resource::builder().with_service_name("mesocri").build();
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("mesocri"));
        telemetry.provider = Some(provider);
        Some(layer.with_filter(traced()))
    };
    tracing_subscriber::registry().with(exporter).with(lines.with_filter(filter)).try_init().map_err(|e| Error::internal(format!("set up logging: {e}")))?;
    Ok(telemetry)
}

/// What is exported: our own spans, down to the steps, which are at level debug. Those of the libraries below are not: the exporter
/// would trace its own calls without end.
fn traced() -> Targets {
    Targets::new().with_target(env!("CARGO_CRATE_NAME"), LevelFilter::DEBUG)
}
