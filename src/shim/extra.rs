//! The private service: what containerd's protocol cannot say. One method, registered by hand: it needs no generated code.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{Empty, StateRequest};
use containerd_shim_protos::ttrpc::asynchronous::{MethodHandler, Service, TtrpcContext};
use containerd_shim_protos::ttrpc::proto::{Codec, Request, Response};
use containerd_shim_protos::ttrpc::{self, Code, get_status};

use super::failure;
use super::supervisor::Supervisor;
use crate::model::error::Error;
use crate::model::shim::{EXTRA_SERVICE, REOPEN_LOG};

/// The service, ready to be registered.
pub fn service(supervisor: Arc<Supervisor>) -> HashMap<String, Service> {
    let method: Box<dyn MethodHandler + Send + Sync> = Box::new(ReopenLog { supervisor });
    let methods = HashMap::from([(REOPEN_LOG.to_owned(), method)]);
    HashMap::from([(EXTRA_SERVICE.to_owned(), Service { methods, streams: HashMap::new() })])
}

struct ReopenLog {
    supervisor: Arc<Supervisor>,
}

#[async_trait]
impl MethodHandler for ReopenLog {
    async fn handler(&self, _ctx: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let answer = StateRequest::decode(&request.payload)
            .map_err(|e| Error::invalid(format!("decode {REOPEN_LOG} request: {e}")))
            .and_then(|request| self.supervisor.reopen_log(&request.id));
        let mut response = Response::new();
        match answer.map_err(failure::status) {
            Ok(()) => {
                response.set_status(get_status(Code::OK, ""));
                response.payload = Codec::encode(&Empty::new()).unwrap_or_default();
            }
            Err(ttrpc::Error::RpcStatus(status)) => response.set_status(status),
            Err(other) => response.set_status(get_status(Code::INTERNAL, other)),
        }
        Ok(response)
    }
}
