//! Addresses that a guest can and cannot reach. All traffic stays on this machine.

use anyhow::{Result, bail};
use serde_json::{Value, json};
use wrenn_e2e::{Sandbox, Service};

/// Tries to connect from the guest. Returns true if the port is open. The timeout is 3 s, because a
/// dropped packet has no response.
async fn connects(sandbox: &Sandbox<'_>, address: &str, port: u16) -> Result<bool> {
    let program = "import socket, sys\n\
        s = socket.socket(); s.settimeout(3)\n\
        try: s.connect((sys.argv[1], int(sys.argv[2]))); print('open')\n\
        except OSError: print('closed')";
    let output = sandbox
        .exec("python3", &["-c", program, address, &port.to_string()])
        .await?;
    match output.stdout.trim() {
        "open" => Ok(true),
        "closed" => Ok(false),
        // A program that did not run proves nothing.
        _ => bail!("failed to try {address}:{port}: {output:?}"),
    }
}

/// Returns the addresses of this host that a guest could try: all except loopback.
fn host_addresses() -> Result<Vec<String>> {
    let output = std::process::Command::new("ip")
        .args(["-4", "-o", "addr"])
        .output()?;
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.split_whitespace().nth(3))
        .filter_map(|cidr| cidr.split('/').next())
        .filter(|address| !address.starts_with("127."))
        .map(str::to_owned)
        .collect())
}

#[tokio::test]
async fn guest_reaches_neither_the_host_nor_another_guest() -> Result<()> {
    let service = Service::start().await?;
    // A service of the host on every address. A guest must not reach it, with or without egress.
    let listener = std::net::TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    for egress in ["deny", "allow"] {
        let first = service.create_with(json!({ "egress": egress })).await?;
        let second = service.create_with(json!({ "egress": egress })).await?;
        assert!(connects(&first, "127.0.0.1", 49983).await?, "its own agent");
        let addresses = host_addresses()?;
        assert!(
            !addresses.is_empty(),
            "the host's end of the link is an address"
        );
        for address in addresses {
            assert!(
                !connects(&first, &address, port).await?,
                "{egress}: {address}"
            );
        }
        assert!(
            !connects(&first, "169.254.0.22", port).await?,
            "the gateway, {egress}"
        );
        let other = second.record().await?["host_ip"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(
            !connects(&first, &other, 49983).await?,
            "another guest, {egress}"
        );
        first.destroy().await?;
        second.destroy().await?;
    }
    Ok(())
}

#[tokio::test]
async fn egress_is_denied_unless_allowed() -> Result<()> {
    egress_follows_the_request(&Service::start().await?, &json!({ "memory_mb": 256 })).await
}

/// Checks the egress of two sandboxes that are created with `request`, one with each policy.
pub(crate) async fn egress_follows_the_request(service: &Service, request: &Value) -> Result<()> {
    let world = World::new()?;
    let with = |egress: &str| {
        let mut request = request.clone();
        request["egress"] = egress.into();
        service.create_with(request)
    };
    let denied = with("deny").await?;
    assert!(!connects(&denied, World::ADDRESS, world.port).await?);
    assert_eq!(
        denied.shell("cat /etc/resolv.conf").await?.stdout.trim(),
        "",
        "no resolver"
    );
    denied.destroy().await?;

    let allowed = with("allow").await?;
    assert!(connects(&allowed, World::ADDRESS, world.port).await?);
    allowed.destroy().await
}

/// Name server on the host's loopback, which no guest can reach. Answers each request with the
/// request itself, marked as a reply.
fn name_server(address: &str) -> Result<()> {
    let socket = std::net::UdpSocket::bind(address)?;
    std::thread::spawn(move || {
        let mut packet = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut packet) {
            packet[2] |= 0x80;
            let _ = socket.send_to(&packet[..length], from);
        }
    });
    Ok(())
}

#[tokio::test]
async fn a_resolver_on_the_hosts_loopback_is_reached_through_the_gateway() -> Result<()> {
    name_server("127.0.77.53:53")?;
    let service = Service::start_with("WRENN_DNS", "127.0.77.53").await?;
    let program = "import socket\n\
        address = open('/etc/resolv.conf').read().split()[1]\n\
        s = socket.socket(type=socket.SOCK_DGRAM); s.settimeout(20)\n\
        s.sendto(b'\\x12\\x34\\x01\\x00' + b'\\x00' * 8, (address, 53))\n\
        print(address, s.recv(512).hex(), open('/sys/class/net/eth0/mtu').read().strip())";
    // The size of the template is restored, another one is booted. A guest learns its name servers
    // in different ways.
    for memory_mb in [512, 256] {
        let request = json!({ "egress": "allow", "memory_mb": memory_mb });
        let sandbox = service.create_with(request).await?;
        let output = sandbox.exec("python3", &["-c", program]).await?;
        let words: Vec<_> = output.stdout.split_whitespace().collect();
        assert_eq!(
            words[..2],
            ["169.254.0.22", "123481000000000000000000"],
            "{output:?}"
        );
        // That of the host's uplink, or the default if it has none.
        let spec = service.dir().join("sandboxes").join(sandbox.id());
        let spec: Value = serde_json::from_slice(&std::fs::read(spec.join("spec.json"))?)?;
        assert_eq!(spec["network"]["mtu"].to_string(), words[2], "{output:?}");
        sandbox.destroy().await?;
    }
    Ok(())
}

/// Host beyond this one, in its own namespace, with an open port.
struct World {
    name: String,
    link: String,
    port: u16,
    server: std::process::Child,
    /// Claims the address.
    _claim: std::fs::File,
}

impl World {
    /// In the range for network benchmarks (RFC 2544), which no real host uses.
    const ADDRESS: &str = "198.19.255.2";

    fn new() -> Result<Self> {
        let claim = std::fs::File::create(std::env::temp_dir().join("wrenn-e2e-world"))?;
        claim.lock()?;
        let id = std::process::id();
        let (name, link, port) = (format!("we2e-{id}"), format!("we2e{id}"), 8080);
        let run = |line: &str| -> Result<()> {
            let status = std::process::Command::new("sh")
                .args(["-ec", line])
                .status()?;
            anyhow::ensure!(status.success(), "failed: {line}");
            Ok(())
        };
        run(&format!(
            "ip netns add {name}
             ip link add {link} type veth peer name eth0 netns {name}
             ip addr add 198.19.255.1/30 dev {link}
             ip link set {link} up
             ip -n {name} addr add 198.19.255.2/30 dev eth0
             ip -n {name} link set eth0 up
             ip -n {name} link set lo up"
        ))?;
        let server = std::process::Command::new("ip")
            .args([
                "netns",
                "exec",
                &name,
                "python3",
                "-m",
                "http.server",
                "--bind",
                "198.19.255.2",
                "8080",
            ])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()?;
        let world = Self {
            name,
            link,
            port,
            server,
            _claim: claim,
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while std::net::TcpStream::connect((Self::ADDRESS, port)).is_err() {
            anyhow::ensure!(std::time::Instant::now() < deadline, "no outside server");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        Ok(world)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = std::process::Command::new("ip")
            .args(["link", "del", &self.link])
            .status();
        let _ = std::process::Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}
