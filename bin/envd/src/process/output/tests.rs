use super::*;

fn end() -> EndEvent {
    EndEvent {
        exit_code: 3,
        exited: true,
        ..Default::default()
    }
}

#[tokio::test]
async fn a_slow_subscriber_holds_the_process_back_and_loses_nothing() {
    let output = Arc::new(Output::default());
    let mut slow = output.subscribe();
    let writer = {
        let output = output.clone();
        tokio::spawn(async move {
            for number in 0..1000_u32 {
                output
                    .publish(Kind::Stdout, Bytes::from(number.to_string()))
                    .await;
            }
            output.finish(end());
        })
    };
    tokio::task::yield_now().await;
    assert!(!writer.is_finished(), "it waits for its reader");
    for number in 0..1000_u32 {
        let Some(Event::Data(data)) = slow.next().await else {
            panic!("lost {number}");
        };
        assert_eq!(
            data.output,
            Some(Stream::Stdout(number.to_string().into_bytes()))
        );
    }
    assert!(matches!(slow.next().await, Some(Event::End(_))));
    writer.await.expect("no panic");
}

#[tokio::test]
async fn a_subscriber_that_goes_away_stops_counting() {
    let output = Arc::new(Output::default());
    let gone = output.subscribe();
    let mut stays = output.subscribe();
    let writer = {
        let output = output.clone();
        tokio::spawn(async move {
            for _ in 0..100 {
                output.publish(Kind::Stderr, Bytes::from_static(b"x")).await;
            }
            output.finish(end());
        })
    };
    tokio::task::yield_now().await;
    drop(gone);
    let mut pieces = 0;
    while let Some(Event::Data(_)) = stays.next().await {
        pieces += 1;
    }
    assert_eq!(pieces, 100);
    writer.await.expect("no panic");
}

fn words(events: &[Event]) -> Vec<String> {
    let word = |event: &Event| match event {
        Event::Data(data) => match &data.output {
            Some(Stream::Stdout(bytes)) => String::from_utf8_lossy(bytes).into_owned(),
            other => format!("{other:?}"),
        },
        Event::Lost(bytes) => format!("lost {bytes}"),
        Event::End(end) => format!("end {}", end.exit_code),
        Event::TooSlow => "too slow".to_owned(),
    };
    events.iter().map(word).collect()
}

async fn say(output: &Output, word: &'static str) {
    output
        .publish(Kind::Stdout, Bytes::from_static(word.as_bytes()))
        .await;
}

#[tokio::test]
async fn what_nobody_heard_is_told_once_to_the_next() {
    let output = Arc::new(Output::default());
    say(&output, "first").await;
    let mut early = output.subscribe();
    say(&output, "second").await;
    let mut other = output.subscribe();
    let heard = [
        early.next().await.expect("kept"),
        early.next().await.expect("sent"),
    ];
    assert_eq!(words(&heard), ["first", "second"]);
    drop(early);
    say(&output, "third").await;
    assert_eq!(words(&[other.next().await.expect("sent")]), ["third"]);
    drop(other);
    say(&output, "fourth").await;
    output.finish(end());
    let mut late = output.subscribe();
    let heard = [
        late.next().await.expect("kept"),
        late.next().await.expect("kept"),
    ];
    assert_eq!(words(&heard), ["fourth", "end 3"]);
    assert!(late.next().await.is_none());
    let last = output.subscribe().next().await.expect("kept");
    assert_eq!(words(&[last]), ["end 3"]);
}

#[tokio::test]
async fn what_the_last_listener_did_not_take_is_told_to_the_next() {
    let output = Arc::new(Output::default());
    let other = output.subscribe();
    let last = output.subscribe();
    for word in ["first", "second"] {
        say(&output, word).await;
    }
    drop(other);
    drop(last);
    say(&output, "third").await;
    let mut again = output.subscribe();
    let heard = [again.next().await.expect("kept")];
    assert_eq!(words(&heard), ["first"]);
    // Some chunks are in the backlog already, and others are only in the queue.
    say(&output, "fourth").await;
    drop(again);
    let late = output.subscribe();
    output.finish(end());
    drop(late);
    // Subscribes after the end, twice.
    drop(output.subscribe());
    let mut late = output.subscribe();
    let mut heard = Vec::new();
    while let Some(event) = late.next().await {
        heard.push(event);
    }
    assert_eq!(words(&heard), ["second", "third", "fourth", "end 3"]);
}

#[tokio::test]
async fn a_piece_that_waits_for_a_listener_that_goes_comes_after_its_queue() {
    let output = Arc::new(Output::default());
    let gone = output.subscribe();
    let writer = {
        let output = output.clone();
        tokio::spawn(async move {
            for number in 0..=QUEUE {
                output
                    .publish(Kind::Stdout, number.to_string().into())
                    .await;
            }
            output.finish(end());
        })
    };
    tokio::task::yield_now().await;
    assert!(!writer.is_finished(), "the queue is full");
    drop(gone);
    writer.await.expect("no panic");
    let mut next = output.subscribe();
    for number in 0..=QUEUE {
        let heard = [next.next().await.expect("kept")];
        assert_eq!(words(&heard), [number.to_string()]);
    }
}

#[tokio::test]
async fn no_more_is_kept_than_the_limit_and_the_rest_is_counted() {
    let output = Arc::new(Output::default());
    for number in 0..10_u8 {
        output
            .publish(Kind::Stdout, vec![number; 20_000].into())
            .await;
    }
    let mut late = output.subscribe();
    let lost = [late.next().await.expect("marked")];
    assert_eq!(words(&lost), ["lost 140000"]);
    for wanted in 7..10_u8 {
        let Some(Event::Data(data)) = late.next().await else {
            panic!("{wanted} was not kept");
        };
        assert_eq!(data.output, Some(Stream::Stdout(vec![wanted; 20_000])));
    }
    let listeners = output.lock();
    assert_eq!((listeners.unheard_bytes, listeners.lost_bytes), (0, 0));
}

#[tokio::test]
async fn a_loss_that_was_not_taken_is_told_to_the_next_with_what_precedes_it() {
    let output = Arc::new(Output::default());
    let publish = async |length: usize| {
        output
            .publish(Kind::Stdout, vec![b'x'; length].into())
            .await;
    };
    publish(UNHEARD_BYTES).await;
    publish(1).await;
    // Takes neither the loss nor the byte.
    drop(output.subscribe());
    let mut second = output.subscribe();
    let lost = [second.next().await.expect("marked")];
    assert_eq!(words(&lost), [format!("lost {UNHEARD_BYTES}")]);
    // Takes the loss and not the byte. Then more is lost, which makes the byte part of the loss.
    drop(second);
    publish(UNHEARD_BYTES).await;
    publish(2).await;
    output.finish(end());
    let mut third = output.subscribe();
    let heard = [
        third.next().await.expect("marked"),
        third.next().await.expect("kept"),
        third.next().await.expect("ended"),
    ];
    let lost = format!("lost {}", UNHEARD_BYTES + 1);
    assert_eq!(words(&heard), [lost.as_str(), "xx", "end 3"]);
}

/// Publishes numbers, more than fit in a queue.
async fn count(output: &Output) {
    for number in 0..=QUEUE {
        output
            .publish(Kind::Stdout, number.to_string().into())
            .await;
    }
}

#[tokio::test]
async fn who_takes_nothing_for_long_is_dropped_and_told() {
    let output = Arc::new(Output::new(Duration::from_millis(50)));
    let mut slow = output.subscribe();
    // Returns although the queue is full.
    count(&output).await;
    let heard = [slow.next().await.expect("told")];
    assert_eq!(words(&heard), ["too slow"]);
    assert!(slow.next().await.is_none());
    // The queue of the dropped subscriber counts as undelivered, once.
    let mut next = output.subscribe();
    drop(slow);
    output.finish(end());
    for number in 0..=QUEUE {
        let heard = [next.next().await.expect("kept")];
        assert_eq!(words(&heard), [number.to_string()]);
    }
    let heard = [next.next().await.expect("ended")];
    assert_eq!(words(&heard), ["end 3"]);
    assert!(next.next().await.is_none());
}

#[tokio::test]
async fn who_reads_is_not_dropped_with_who_does_not() {
    let output = Arc::new(Output::new(Duration::from_millis(50)));
    let mut slow = output.subscribe();
    let mut reader = output.subscribe();
    let reading = async {
        let mut heard = Vec::new();
        while let Some(event) = reader.next().await {
            heard.push(event);
        }
        heard
    };
    let writing = async {
        count(&output).await;
        output.finish(end());
    };
    let (heard, ()) = tokio::join!(reading, writing);
    assert_eq!(heard.len(), QUEUE + 2);
    let heard = [slow.next().await.expect("told")];
    assert_eq!(words(&heard), ["too slow"]);
    // All output was delivered to the other subscriber.
    drop(slow);
    let heard = [output.subscribe().next().await.expect("ended")];
    assert_eq!(words(&heard), ["end 3"]);
}

#[tokio::test]
async fn the_end_reaches_who_is_slow_after_all_output() {
    let output = Arc::new(Output::default());
    let mut slow = output.subscribe();
    say(&output, "last").await;
    // Returns although the subscriber has taken nothing.
    output.finish(end());
    let heard = [
        slow.next().await.expect("sent"),
        slow.next().await.expect("ended"),
    ];
    assert_eq!(words(&heard), ["last", "end 3"]);
    assert!(slow.next().await.is_none());
}
