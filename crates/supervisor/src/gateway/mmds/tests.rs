use super::*;
use proptest::prelude::*;

fn service() -> Mmds {
    Mmds::new(json!({
        "instanceID": "sb-1", "envID": "base", "address": "", "number": 7,
        "more": { "deep": { "er": "x" } },
    }))
}

fn send(mmds: &mut Mmds, now: Instant, request: &str) -> Response {
    let request = request.replace('\n', "\r\n");
    let request = Request::parse(request.as_bytes()).unwrap().unwrap();
    mmds.answer(&request, now)
}

fn token(mmds: &mut Mmds, now: Instant) -> String {
    let request = "PUT /latest/api/token HTTP/1.1\nX-metadata-token-ttl-seconds: 60\n\n";
    let given = send(mmds, now, request);
    assert_eq!(given.status, 200);
    given.body
}

fn get(path: &str, accept: &str) -> (u16, String) {
    let (mut mmds, now) = (service(), Instant::now());
    let token = token(&mut mmds, now);
    let request = format!("GET {path} HTTP/1.1\nX-metadata-token: {token}\nAccept: {accept}\n\n");
    let answer = send(&mut mmds, now, &request);
    (answer.status, answer.body)
}

#[test]
fn metadata_is_served_as_json_or_lines() {
    let (status, body) = get("/", "application/json");
    assert_eq!(status, 200);
    assert_eq!(
        serde_json::from_str::<Value>(&body).unwrap(),
        service().data
    );
    assert_eq!(
        get("/", "*/*"),
        (200, "address\nenvID\ninstanceID\nmore/\nnumber".to_owned())
    );
    assert_eq!(get("/envID", "text/plain"), (200, "base".to_owned()));
    assert_eq!(
        get("/envID", "application/json"),
        (200, "\"base\"".to_owned())
    );
    assert_eq!(get("//more///deep/", "*/*"), (200, "er".to_owned()));
    assert_eq!(get("/more/deep/er?x=y", "*/*"), (200, "x".to_owned()));
    assert_eq!(get("/number", "*/*").0, 501);
    assert_eq!(get("/number", "application/json"), (200, "7".to_owned()));
    assert_eq!(
        get("/nothing", "*/*"),
        (404, "Resource not found: /nothing.".to_owned())
    );
}

#[test]
fn request_without_a_token_is_rejected() {
    let (mut mmds, now) = (service(), Instant::now());
    for header in ["", "X-metadata-token: \n", "X-metadata-token: 00\n"] {
        let answer = send(&mut mmds, now, &format!("GET / HTTP/1.1\n{header}\n"));
        assert_eq!(answer.status, 401, "{header}");
    }
    let token = token(&mut mmds, now);
    let get = format!("GET / HTTP/1.1\nx-METADATA-token: {token}\n\n");
    assert_eq!(send(&mut mmds, now, &get).status, 200);
    let later = now + Duration::from_secs(60);
    assert_eq!(send(&mut mmds, later, &get).status, 401);
}

#[test]
fn a_token_needs_a_lifetime_within_bounds() {
    let (mut mmds, now) = (service(), Instant::now());
    for (header, status) in [
        ("", 400),
        ("X-metadata-token-ttl-seconds: 0\n", 400),
        ("X-metadata-token-ttl-seconds: 21601\n", 400),
        ("X-metadata-token-ttl-seconds: -1\n", 400),
        ("X-metadata-token-ttl-seconds: soon\n", 400),
        ("X-metadata-token-ttl-seconds: 1\n", 200),
        ("X-metadata-token-ttl-seconds: 21600\n", 200),
        ("X-aws-ec2-metadata-token-ttl-seconds: 60\n", 200),
        (
            "X-metadata-token-ttl-seconds: 60\nX-Forwarded-For: 1.2.3.4\n",
            400,
        ),
    ] {
        let request = format!("PUT /latest/api/token HTTP/1.1\n{header}\n");
        assert_eq!(send(&mut mmds, now, &request).status, status, "{header}");
    }
    let request = "PUT /other HTTP/1.1\nX-metadata-token-ttl-seconds: 60\n\n";
    assert_eq!(send(&mut mmds, now, request).status, 404);
}

#[test]
fn other_methods_are_rejected_with_the_allowed_ones() {
    let (mut mmds, now) = (service(), Instant::now());
    for method in ["POST", "DELETE", "HEAD", "PATCH"] {
        let answer = send(&mut mmds, now, &format!("{method} / HTTP/1.1\n\n"));
        assert_eq!(answer.status, 405);
        let text = String::from_utf8(answer.to_bytes()).unwrap();
        assert!(text.contains("\r\nAllow: GET, PUT\r\n"), "{text}");
    }
}

#[test]
fn invalid_request_is_distinguished_from_an_incomplete_one() {
    assert!(
        Request::parse(b"GET / HTTP/1.1\r\nHost: x\r\n")
            .unwrap()
            .is_none()
    );
    assert!(Request::parse(b"\x16\x03\x01").is_err());
    assert!(Request::parse(b"GET * HTTP/1.1\r\n\r\n").is_err());
    let long = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(http::MAX_HEAD_BYTES));
    assert!(Request::parse(long.as_bytes()).is_err());
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(100));
    assert!(Request::parse(many.as_bytes()).is_err());
}

#[test]
fn metadata_response_has_the_documented_bytes() {
    let answer = Response::text(401, "no").to_bytes();
    let text = "HTTP/1.1 401 Unauthorized\r\nServer: Wrenn\r\nConnection: close\r\n\
        Content-Type: text/plain\r\nContent-Length: 2\r\n\r\nno";
    assert_eq!(String::from_utf8(answer).unwrap(), text);
}

proptest! {
    #[test]
    fn any_bytes_are_answered_or_rejected(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        if let Ok(Some(request)) = Request::parse(&bytes) {
            let _ = service().answer(&request, Instant::now()).to_bytes();
        }
    }

    #[test]
    fn any_path_has_one_complete_response(path in "/[ -~]{0,60}", accept in "[ -~]{0,20}") {
        let path = path.replace(' ', "");
        let (mut mmds, now) = (service(), Instant::now());
        let token = token(&mut mmds, now);
        let text = format!("GET {path} HTTP/1.1\r\nX-metadata-token: {token}\r\nAccept: {accept}\r\n\r\n");
        if let Ok(Some(request)) = Request::parse(text.as_bytes()) {
            let answer = mmds.answer(&request, now);
            prop_assert!([200, 404, 501].contains(&answer.status));
            let bytes = answer.to_bytes();
            // Bytes sent by the guest must not appear in the head of a response.
            let head = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
            prop_assert_eq!(bytes.len() - head - 4, answer.body.len());
        }
    }
}
