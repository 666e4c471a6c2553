//! The daemon pulls through the CRI from a registry with TLS of a private authority and passwords.

use mesocri::wire::cri as api;
use tonic::Code;

use crate::common::Node;
use crate::fixture::{OciLayout, Options, Registry};

#[tokio::test(flavor = "current_thread")]
async fn a_private_authority_and_a_password_by_pull_image() {
    let mut node = Node::prepare("");
    let registry = Registry::start(&Options { htpasswd: true, tls: true, ..Options::default() });
    registry.push(OciLayout::simple("a").path(), "team/a:1", &["--dest-creds", "user:secret"]);
    let name = format!("{}/team/a:1", registry.host);
    let pull = async |node: &Node, password: Option<&str>| {
        let auth = password.map(|p| api::AuthConfig { username: "user".into(), password: p.into(), ..Default::default() });
        let request = api::PullImageRequest { image: Some(api::ImageSpec { image: name.clone(), ..Default::default() }), auth, sandbox_config: None };
        node.images().pull_image(request).await.map(|answer| answer.into_inner().image_ref)
    };
    let hosts = node.dir.path().join("hosts");
    let own = hosts.join(&registry.host);
    std::fs::create_dir_all(&own).unwrap();
    let server = format!("server = \"https://{}\"\n", registry.host);
    std::fs::write(own.join("hosts.toml"), &server).unwrap();
    node.extra_config = format!("[provisioner]\npull_retries = 0\nregistry_config_dir = {hosts:?}\n");
    node.start_daemon(&[]);

    // Nobody vouches for the certificate: the error says what is wrong with which registry.
    let error = pull(&node, Some("secret")).await.unwrap_err();
    assert!(error.message().contains("certificate") && error.message().contains(&registry.host), "{error}");
    assert_eq!((error.code(), error.message().starts_with("RegistryUnavailable")), (Code::Unknown, true), "{error}");

    std::fs::write(own.join("hosts.toml"), format!("{server}ca = {:?}\n", registry.cert())).unwrap();
    for wrong in [None, Some("wrong!pass")] {
        let error = pull(&node, wrong).await.unwrap_err();
        assert_eq!(error.code(), Code::Unauthenticated, "{error}");
        assert!(error.message().contains("pull") && error.message().contains(&registry.host), "{error}");
        assert!(!error.message().contains("wrong!pass") && !node.daemon_log().contains("wrong!pass"), "a password is told: {error}");
    }
    let listed = async || node.images().list_images(api::ListImagesRequest::default()).await.unwrap().into_inner().images;
    assert!(listed().await.is_empty());
    let id = pull(&node, Some("secret")).await.unwrap();
    let images = listed().await;
    assert_eq!((images.len(), images[0].id.as_str(), images[0].repo_tags.as_slice()), (1, id.as_str(), std::slice::from_ref(&name)));
    assert!(!node.daemon_log().contains("secret"));
    drop(registry);
    node.finish();
}
