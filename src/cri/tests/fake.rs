//! A fake engine and made-up pods.
use crate::containerizer::Pod;
use crate::model::phase::PodPhase;
use crate::model::{PodId, PodSpec};

/// A ready pod.
pub fn pod(id: &str) -> Pod {
    Pod {
        id: PodId::from_string(id),
        spec: PodSpec::default(),
        phase: PodPhase::Ready,
        created_at: 1,
        ips: vec!["10.0.0.2".into(), "fd00::2".into()],
        sandbox: None,
        netns: None,
        network: None,
        leftovers: Vec::new(),
    }
}
