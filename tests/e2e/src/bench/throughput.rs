//! Round trips and throughput through the whole stack, compared with the same operation done
//! directly.

use std::time::Instant;

use anyhow::{Context as _, Result};
use reqwest::{Method, multipart};
use serde_json::{Value, json};

use super::{median, rounded};
use crate::{Sandbox, Service};

const EXEC_ROUNDS: usize = 50;
const FILE_ROUNDS: usize = 3;
const FILE_MIB: usize = 64;

/// Measures an exec of `/bin/true` through REST, compared with the same spawn inside the guest.
///
/// # Errors
/// The sandbox does not work as expected.
pub async fn exec(service: &Service) -> Result<Value> {
    let sandbox = service.create_with(json!({ "memory_mb": 512 })).await?;
    let mut times = Vec::new();
    for _ in 0..EXEC_ROUNDS {
        let begun = Instant::now();
        sandbox.exec("/bin/true", &[]).await?;
        times.push(begun.elapsed().as_secs_f64() * 1000.0);
    }
    let program = "import os, time\n\
        def once():\n\
        \x20   t = time.perf_counter(); os.waitpid(os.posix_spawn('/bin/true', ['true'], os.environ), 0)\n\
        \x20   return time.perf_counter() - t\n\
        times = sorted(once() for _ in range(50)); print(times[25] * 1000)";
    let inside: f64 = sandbox
        .exec("python3", &["-c", program])
        .await?
        .stdout
        .trim()
        .parse()?;
    sandbox.destroy().await?;
    let through = median(times);
    Ok(json!({
        "rest_exec_true_ms": rounded(through),
        "spawn_inside_the_guest_ms": rounded(inside),
        "on_top_ms": rounded(through - inside),
        "rounds": EXEC_ROUNDS,
    }))
}

/// Measures upload and download in MB/s, compared with `socat` through the same virtio network.
///
/// # Errors
/// The sandbox does not work as expected.
pub async fn files(service: &Service) -> Result<Value> {
    let sandbox = service.create_with(json!({ "memory_mb": 512 })).await?;
    let (mut up, mut down, mut raw_up, mut raw_down) = (vec![], vec![], vec![], vec![]);
    for _ in 0..FILE_ROUNDS {
        up.push(upload(service, &sandbox).await?);
        down.push(download(service, &sandbox).await?);
        raw_up.push(
            raw(
                &sandbox,
                "socat -u TCP-LISTEN:9999,reuseaddr CREATE:/home/user/raw",
                true,
            )
            .await?,
        );
        raw_down.push(
            raw(
                &sandbox,
                "socat -u OPEN:/home/user/raw TCP-LISTEN:9999,reuseaddr",
                false,
            )
            .await?,
        );
    }
    sandbox.destroy().await?;
    let (up, down, raw_up, raw_down) = (median(up), median(down), median(raw_up), median(raw_down));
    Ok(json!({
        "upload_mb_s": rounded(up),
        "socat_upload_mb_s": rounded(raw_up),
        "upload_ratio": rounded(up / raw_up),
        "download_mb_s": rounded(down),
        "socat_download_mb_s": rounded(raw_down),
        "download_ratio": rounded(down / raw_down),
        "file_mib": FILE_MIB,
        "rounds": FILE_ROUNDS,
    }))
}

fn megabytes_a_second(begun: Instant) -> f64 {
    let megabytes = u32::try_from(FILE_MIB).map_or(f64::NAN, f64::from) * 1.048_576;
    megabytes / begun.elapsed().as_secs_f64()
}

async fn upload(service: &Service, sandbox: &Sandbox<'_>) -> Result<f64> {
    let form = multipart::Form::new()
        .text("path", "/home/user/bench")
        .part(
            "file",
            multipart::Part::bytes(vec![0x5a; FILE_MIB << 20]).file_name("f"),
        );
    let begun = Instant::now();
    let request = service.request(Method::POST, &sandbox.path("/files/stream/write"));
    request.multipart(form).send().await?.error_for_status()?;
    Ok(megabytes_a_second(begun))
}

async fn download(service: &Service, sandbox: &Sandbox<'_>) -> Result<f64> {
    let begun = Instant::now();
    let request = service.request(Method::POST, &sandbox.path("/files/stream/read"));
    let body = json!({ "path": "/home/user/bench" });
    let bytes = request
        .json(&body)
        .send()
        .await?
        .error_for_status()?
        .bytes()
        .await?;
    anyhow::ensure!(bytes.len() == FILE_MIB << 20, "short: {}", bytes.len());
    Ok(megabytes_a_second(begun))
}

/// Transfers the same bytes over a plain TCP connection to `socat` in the guest.
async fn raw(sandbox: &Sandbox<'_>, listener: &str, upload: bool) -> Result<f64> {
    let address = sandbox.record().await?["host_ip"]
        .as_str()
        .context("no address in the record")?
        .to_owned();
    let serve = sandbox.shell(listener);
    let transfer = async {
        let stream = crate::wait::until("socat listens", crate::wait::GENEROUS, async || {
            Ok(tokio::net::TcpStream::connect((address.as_str(), 9999))
                .await
                .ok())
        })
        .await?;
        let begun = Instant::now();
        transfer(stream, upload).await?;
        Ok::<_, anyhow::Error>(begun)
    };
    let (served, begun) = tokio::try_join!(serve, transfer)?;
    anyhow::ensure!(served.code == 0, "{served:?}");
    Ok(megabytes_a_second(begun))
}

async fn transfer(mut stream: tokio::net::TcpStream, upload: bool) -> Result<()> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut buffer = vec![0x5a; 64 * 1024];
    if upload {
        for _ in 0..(FILE_MIB << 20) / buffer.len() {
            stream.write_all(&buffer).await?;
        }
        stream.shutdown().await?;
    } else {
        while stream.read(&mut buffer).await? > 0 {}
    }
    Ok(())
}
