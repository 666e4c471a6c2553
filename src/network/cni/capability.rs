//! What a pod asks of its network beyond an address, in the words of CNI: arguments and `runtimeConfig` values.

use serde_json::{Map, Value, json};

use crate::model::error::{Error, Result};
use crate::model::{PodId, PodSpec};

/// "No limit" of the bandwidth plugin, which refuses larger bursts. Bits.
const BURST: u64 = (1 << 31) - 1;

/// `CNI_ARGS` of a pod.
///
/// # Errors
/// `InvalidArgument` for values that would end their argument early.
pub fn args(pod: &PodId, spec: &PodSpec) -> Result<String> {
    let mut text = String::from("IgnoreUnknown=1");
    let meta = &spec.metadata;
    for (key, value) in
        [("K8S_POD_NAMESPACE", meta.namespace.as_str()), ("K8S_POD_NAME", &meta.name), ("K8S_POD_INFRA_CONTAINER_ID", pod.as_str()), ("K8S_POD_UID", &meta.uid)]
    {
        if value.contains([';', '\0']) {
            return Err(Error::invalid(format!("pass {key} to CNI plugins: {value:?} contains a semicolon")));
        }
        text.push_str(&format!(";{key}={value}"));
    }
    Ok(text)
}

/// Values by capability name. A plugin gets those whose capabilities its configuration declares.
///
/// # Errors
/// `InvalidArgument` for bandwidth annotations that are no quantities.
pub fn capabilities(spec: &PodSpec) -> Result<Map<String, Value>> {
    let mut values = Map::new();
    let ports: Vec<Value> = spec
        .port_mappings
        .iter()
        .filter(|p| p.host_port > 0)
        .map(|p| json!({"hostPort": p.host_port, "containerPort": p.container_port, "protocol": p.protocol.name(), "hostIP": p.host_ip}))
        .collect();
    if !ports.is_empty() {
        values.insert("portMappings".into(), ports.into());
    }
    let mut bandwidth = Map::new();
    for direction in ["ingress", "egress"] {
        let key = format!("kubernetes.io/{direction}-bandwidth");
        if let Some(text) = spec.annotations.get(&key) {
            let rate = quantity(text).ok_or_else(|| Error::invalid(format!("annotation {key}: {text:?} is no quantity of bits per second")))?;
            bandwidth.insert(format!("{direction}Rate"), rate.into());
            bandwidth.insert(format!("{direction}Burst"), BURST.into());
        }
    }
    if !bandwidth.is_empty() {
        values.insert("bandwidth".into(), bandwidth.into());
    }
    if let Some(dns) = &spec.dns {
        values.insert("dns".into(), json!({"servers": dns.servers, "searches": dns.searches, "options": dns.options}));
    }
    if !spec.cgroup_parent.is_empty() {
        values.insert("cgroupPath".into(), spec.cgroup_parent.clone().into());
    }
    if !spec.annotations.is_empty() {
        values.insert("io.kubernetes.cri.pod-annotations".into(), json!(spec.annotations));
    }
    Ok(values)
}

/// A Kubernetes quantity that is a whole number of units: `10M`, `1.5Gi`, `8e6`.
fn quantity(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let scale = match suffix {
        "" => 1.0,
        "m" => 1e-3,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "Ki" => 1024f64,
        "Mi" => 1024f64.powi(2),
        "Gi" => 1024f64.powi(3),
        "Ti" => 1024f64.powi(4),
        "Pi" => 1024f64.powi(5),
        _ => 10f64.powi(suffix.strip_prefix(['e', 'E'])?.parse().ok().filter(|e| (-15..=15).contains(e))?),
    };
    let value = number.parse::<f64>().ok()? * scale;
    // Kubernetes bounds: 1k and 1P.
    (1e3..=1e15).contains(&value).then_some(value.round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::pod::{Dns, PodMetadata, PortMapping, Protocol};

    #[test]
    fn quantities() {
        for (text, want) in [("10M", Some(10_000_000)), ("1.5Gi", Some(1_610_612_736)), ("8e6", Some(8_000_000)), ("1000", Some(1000)), ("2P", None)] {
            assert_eq!(quantity(text), want, "{text}");
        }
        for text in ["", "M", "1MM", "-1M", "1e99", "999", "1.2.3M", "+5M"] {
            assert_eq!(quantity(text), None, "{text}");
        }
    }

    #[test]
    fn what_a_pod_asks_for() {
        let port = |host_port, protocol| PortMapping { protocol, container_port: 80, host_port, host_ip: "1.2.3.4".into() };
        let mut spec = PodSpec {
            metadata: PodMetadata { name: "n".into(), uid: "u".into(), namespace: "ns".into(), attempt: 0 },
            port_mappings: vec![port(0, Protocol::Tcp), port(8080, Protocol::Udp)],
            dns: Some(Dns { servers: vec!["9.9.9.9".into()], ..Dns::default() }),
            ..PodSpec::default()
        };
        spec.annotations.insert("kubernetes.io/egress-bandwidth".into(), "1M".into());
        let values = capabilities(&spec).unwrap();
        assert_eq!(values["portMappings"], json!([{"hostPort": 8080, "containerPort": 80, "protocol": "udp", "hostIP": "1.2.3.4"}]));
        assert_eq!(values["bandwidth"], json!({"egressRate": 1_000_000, "egressBurst": BURST}));
        assert_eq!(values["dns"], json!({"servers": ["9.9.9.9"], "searches": [], "options": []}));
        let pod = PodId::from_string("id");
        assert_eq!(args(&pod, &spec).unwrap(), "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=n;K8S_POD_INFRA_CONTAINER_ID=id;K8S_POD_UID=u");
        spec.metadata.name = "n;CNI=1".into();
        assert!(args(&pod, &spec).is_err());
        spec.annotations.insert("kubernetes.io/egress-bandwidth".into(), "fast".into());
        assert!(capabilities(&spec).is_err());
    }
}
