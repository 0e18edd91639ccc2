//! Studies from the command line: asked and told, with any program, by several workers, compared.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::process::Stdio;

use serde_json::Value;
use support::{Bench, stderr};

/// A little program as the objective; fails on one combination.
const PROGRAM: &str = r#"
case "$CASKD_PARAM_KD_TYPE$CASKD_PARAM_LAYERS" in
  klnone) echo "diverged: loss is nan" >&2; exit 3;;
esac
echo "talk"
echo "{\"value\": $CASKD_PARAM_SCALING_VALUE.25}"
"#;

/// Exit code 2 with each of `expected` in what is said.
fn usage(bench: &Bench, arguments: &[&str], expected: &[&str]) {
    let output = bench.run(arguments);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
    for part in expected {
        assert!(said.contains(part), "{said}");
    }
}

fn refused(bench: &Bench, arguments: &[&str], expected: &[&str]) {
    usage(bench, arguments, &[&["hint: "], expected].concat());
}

#[test]
fn options_without_an_effect_are_refused() {
    let bench = Bench::empty();
    bench.write("file", "");
    let search = |more: &[&'static str]| {
        [&["search", "--command", "echo 1", "--trials", "1"], more].concat()
    };
    for (more, expected) in [
        (
            ["--out", "s", "--sampler", "gp", "--alpha", "3"].as_slice(),
            "options of sabo, not of gp",
        ),
        (
            &["--out", "s", "--compare", "gp,tpe", "--laei"],
            "options of sabo",
        ),
        (&["--out", "s", "--compare", "gp,tpe,gp"], "gp twice"),
        (
            &["--out", "s", "--compare", "gp", "--study", "sqlite:x.db"],
            "file of its own",
        ),
        (&["--out", "file"], "cannot create `file`"),
        (&["--out", "file/s"], "cannot create `file/s`"),
    ] {
        refused(&bench, &search(more), &[expected]);
    }
    let ask = ["ask", "s", "--sampler", "random", "--inverted"];
    refused(&bench, &ask, &["options of sabo, not of random"]);
    for (more, expected) in [
        (["--eta", "4"].as_slice(), "--halving"),
        (&["--trust", "0.5"], "--halving"),
        (&["--promote", "4"], "--halving"),
        (&["--rungs", "4"], "--halving"),
        (&["--fractions", "0.1,1", "--rungs", "4"], "--fractions"),
        (&["--validation", "0.2"], "--validation"),
        (&["--shards", "x"], "--shards"),
        (&["--allow-low-fidelity"], "--allow-low-fidelity"),
    ] {
        let all = search(&[&["--out", "s"], more].concat());
        usage(&bench, &all, &[expected]);
    }
    assert!(!bench.path("s").exists());
}

#[test]
fn a_space_with_values_that_no_training_takes_is_refused_at_once() {
    let bench = Bench::new();
    bench.cache("cache", 6, &[]);
    bench.write("loss.toml", "[[loss]]\nkind = \"kl\"\n");
    let search = |space: &str, more: &[&'static str]| {
        bench.write("space.toml", space);
        let all = [
            "search",
            "--cache",
            "cache",
            "--student",
            "teacher",
            "--out",
            "s",
            "--space",
            "space.toml",
        ];
        [all.as_slice(), more].concat()
    };
    let int = "[[param]]\nname = \"batch_size\"\nkind = \"int\"\nlow = 0\nhigh = 9\n";
    refused(&bench, &search(int, &[]), &["`batch_size` = 0"]);
    let real = "[[param]]\nname = \"batch_size\"\nkind = \"float\"\nlow = 1\nhigh = 8\n";
    refused(&bench, &search(real, &[]), &["`batch_size` = 3.2"]);
    let list = "[[param]]\nname = \"batch_size\"\nkind = \"ordinal\"\nvalues = [2, 2]\n";
    refused(&bench, &search(list, &[]), &["must ascend"]);
    let tau = "[[param]]\nname = \"loss.0.tau\"\nkind = \"float\"\nlow = -1\nhigh = 4\n";
    refused(
        &bench,
        &search(tau, &["--config", "loss.toml"]),
        &["`temperature` = -1"],
    );
    let recipe = ["--space", "table2", "--config", "loss.toml"];
    let table2 = [&search(tau, &[])[..7], &recipe].concat();
    refused(&bench, &table2, &["no effect beside explicit [[loss]]"]);
    assert!(!bench.path("s").exists());
}

/// The shell ends when it is asked to; what it started must not go on beside the next trial.
#[test]
#[cfg(target_os = "linux")]
fn what_a_program_started_ends_with_it() {
    let bench = Bench::empty();
    let deaf = "trap \"\" TERM; echo $$ > pid; while :; do sleep 0.1; done";
    let command = format!("sh -c '{deaf}'; true");
    let search = ["search", "--out", "study", "--trials", "1"];
    let timed = ["--timeout", "0.5s", "--command", &command];
    refused(&bench, &[search.as_slice(), &timed].concat(), &["failed"]);
    let pid = std::fs::read_to_string(bench.path("pid")).unwrap();
    // It is gone, or dead and not yet collected by the system.
    let state = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z"), "{state}");
}

#[test]
fn a_study_without_a_folder_for_its_trials_is_refused_before_it_is_made() {
    let server = "postgres://nobody@127.0.0.1:1/nothing";
    let search = ["search", "--command", "echo 1", "--study", server];
    refused(&Bench::empty(), &search, &["no folder", "give --out"]);
}

#[test]
fn the_command_that_uses_the_best_trial_survives_the_shell() {
    let bench = Bench::empty();
    let output = bench.ok(&[
        "search",
        "--command",
        "cat {params.json} > /dev/null && test {trial} = 0 && echo 7",
        "--out",
        "a b's",
        "--trials",
        "1",
    ]);
    let said = stderr(&output);
    let command = said.lines().find_map(|line| line.strip_prefix("use it: "));
    let again = std::process::Command::new("sh")
        .args(["-c", command.unwrap()])
        .current_dir(bench.path(""))
        .output()
        .unwrap();
    assert_eq!(again.stdout, b"7\n", "{said}");
}

#[test]
fn asked_and_told() {
    let bench = Bench::empty();
    let ask = |more: &[&str]| bench.json(&[&["ask", "study", "--json"], more].concat());
    let first = ask(&["--space", "table2", "--sampler", "sabo", "--seed", "7"]);
    assert_eq!(first["trial"], 0);
    let params = first["params"].as_object().unwrap();
    let names: Vec<&String> = params.keys().collect();
    assert_eq!(names.len(), 7);
    for name in ["hard_weight", "soft_weight", "scaling_value"] {
        assert!(params[name].is_number());
    }
    for name in ["logits_norm", "hidden_norm", "layers", "kd_type"] {
        assert!(params[name].is_string());
    }
    // Several may be open; the options need not be given again, but may not differ.
    assert_eq!(ask(&[])["trial"], 1);
    assert_eq!(ask(&["--seed", "7"])["trial"], 2);
    for other in [
        ["--seed", "8"].as_slice(),
        &["--sampler", "gp"],
        &["--maximize"],
        &["--alpha", "3"],
    ] {
        refused(
            &bench,
            &[&["ask", "study"], other].concat(),
            &["was created with another"],
        );
    }
    let told = bench.json(&["tell", "study", "1", "--value", "-2.5", "--json"]);
    assert_eq!(
        (&told["recorded"], &told["state"]),
        (&Value::Bool(true), &"complete".into())
    );
    let again = bench.json(&["tell", "study", "1", "--value", "-2.5", "--json"]);
    assert_eq!(again["recorded"], false);
    bench.ok(&["tell", "study", "0", "--failed", "--reason", "-inf"]);
    refused(
        &bench,
        &["tell", "study", "1", "--value", "3"],
        &["already complete"],
    );
    refused(
        &bench,
        &["tell", "study", "9", "--value", "3"],
        &["no trial 9"],
    );
    refused(
        &bench,
        &["tell", "study", "2", "--value", "nan"],
        &["--failed"],
    );
    refused(
        &bench,
        &["tell", "study", "2", "--value", "inf"],
        &["--failed"],
    );
    // Its square would be infinite, and so would be the study's mean and deviation.
    refused(
        &bench,
        &["tell", "study", "2", "--value", "-1e308"],
        &["beyond ±1e150: -1e308", "--failed"],
    );
    refused(&bench, &["ask", ""], &["its name is empty"]);
    refused(
        &bench,
        &["tell", "nothing", "2", "--value", "1"],
        &["holds no study"],
    );
    refused(&bench, &["ask", "mysql://host/db"], &["mysql"]);
    let status = bench.json(&["status", "study", "--json"]);
    assert_eq!(
        (&status["complete"], &status["failed"]),
        (&1.into(), &1.into())
    );
    assert_eq!(status["running"][0]["trial"], 2);
    assert!(status["running"][0]["lease_seconds"].as_f64().unwrap() > 80_000.0);
    assert_eq!(status["best"]["value"], -2.5);
    // A lease that has run out is handed out again, under a new token.
    let short = ask(&["--lease", "0s"]);
    let taken = ask(&[]);
    assert_eq!(
        (&taken["trial"], &taken["resumed"]),
        (&short["trial"], &Value::Bool(true))
    );
    let trial = short["trial"].to_string();
    let late = bench.json(&[
        "tell", "study", &trial, "--value", "1", "--token", "1", "--json",
    ]);
    assert_eq!(
        (&late["late"], &late["state"]),
        (&Value::Bool(true), &"running".into())
    );
}

#[test]
fn the_same_seed_asks_the_same() {
    let bench = Bench::empty();
    let asked = |study: &str| -> Vec<Value> {
        (0..12)
            .map(|i: u32| {
                let asked = bench.json(&["ask", study, "--seed", "3", "--sampler", "gp", "--json"]);
                let value = format!("{}", f64::from(i * 7 % 5));
                bench.ok(&[
                    "tell",
                    study,
                    &asked["trial"].to_string(),
                    "--value",
                    &value,
                ]);
                asked["params"].clone()
            })
            .collect()
    };
    assert_eq!(asked("one"), asked("sqlite:other.db"));
}

#[test]
fn any_program_is_an_objective() {
    let bench = Bench::empty();
    bench.write("objective.sh", PROGRAM);
    let search = |more: &[&str]| {
        bench.command(
            &[
                &[
                    "search",
                    "--command",
                    "sh objective.sh {params.json}",
                    "--out",
                    "study",
                    "--trials",
                    "12",
                    "--sampler",
                    "random",
                    "--json",
                ],
                more,
            ]
            .concat(),
        )
    };
    let output = search(&[]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["completed"], true);
    assert_eq!(
        found["complete"].as_u64().unwrap() + found["failed"].as_u64().unwrap(),
        12
    );
    assert!(found["best"]["value"].as_f64().unwrap().fract() == 0.25);
    for which in ["best", "recommended"] {
        let file = format!("study/{which}.json");
        assert_eq!(found[format!("{which}_config")], file);
        let params = std::fs::read_to_string(bench.path(&file)).unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&params).unwrap(),
            found[which]["params"]
        );
    }
    // More trials need nothing but the study; another command is another study.
    let more = bench.json(&[
        "search", "--out", "study", "--resume", "--trials", "20", "--json",
    ]);
    assert_eq!(more["trials"], 20);
    refused(
        &bench,
        &["search", "--out", "study", "--resume", "--command", "true"],
        &["another command"],
    );
    refused(
        &bench,
        &["search", "--command", "no-such-program", "--out", "other"],
        &["can't run `no-such-program`"],
    );
    bench.ok(&["report", "study", "--out", "report.html"]);
    let page = std::fs::read_to_string(bench.path("report.html")).unwrap();
    assert!(page.contains("diverged: loss is nan") || found["failed"] == 0);
}

/// The hint leads to the reasons.
#[test]
fn a_search_without_a_value_is_an_error() {
    let bench = Bench::empty();
    let failing = "echo out of luck >&2; exit 3";
    let search = [
        "search",
        "--command",
        failing,
        "--out",
        "study",
        "--trials",
        "2",
        "--json",
    ];
    let expected = [
        "no trial of study `study` has a value",
        "caskd report study --out report.html",
    ];
    refused(&bench, &search, &expected);
    refused(&bench, &[&search[..], &["--resume"]].concat(), &expected);
    bench.ok(&["report", "study", "--out", "report.html"]);
    let page = std::fs::read_to_string(bench.path("report.html")).unwrap();
    assert!(page.contains("out of luck"));
}

#[test]
fn workers_join_and_a_killed_one_loses_nothing() {
    let bench = Bench::empty();
    let begin = [
        "search",
        "--command",
        "sleep 0.2; echo 1",
        "--out",
        "study",
        "--trials",
        "14",
        "--sampler",
        "random",
    ];
    let quiet = |arguments: &[&str]| {
        bench
            .command(arguments)
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut first = quiet(&begin);
    while bench.run(&["status", "study"]).status.code() != Some(0) {
        assert!(first.try_wait().unwrap().is_none());
    }
    let mut workers: Vec<_> = (0..2)
        .map(|_| quiet(&["search", "--worker", "--out", "study"]))
        .collect();
    std::thread::sleep(std::time::Duration::from_millis(700));
    first.kill().unwrap();
    first.wait().unwrap();
    for worker in &mut workers {
        assert!(worker.wait().unwrap().success());
    }
    let status = bench.json(&["status", "study", "--json"]);
    assert_eq!(status["complete"], 14);
    assert_eq!(status["completed"], true);
}

#[test]
fn samplers_are_compared() {
    let bench = Bench::empty();
    let compared = bench.json(&[
        "search",
        "--command",
        "echo $CASKD_PARAM_SCALING_VALUE",
        "--out",
        "comparison",
        "--trials",
        "8",
        "--compare",
        "gp,random",
        "--seeds",
        "3",
        "--json",
    ]);
    assert_eq!(
        compared["samplers"][0]["studies"].as_array().unwrap().len(),
        3
    );
    let mean = |i: usize| compared["samplers"][i]["mean"].as_f64().unwrap();
    let difference = compared["tests"][0]["difference"].as_f64().unwrap();
    assert!((difference - (mean(0) - mean(1))).abs() < 1e-12);
    bench.ok(&[
        "report",
        "comparison",
        "comparison/gp-0",
        "--out",
        "report.html",
    ]);
}

/// Without a space, trials are those that the cache can answer; where it can answer none, no study is made.
#[test]
fn the_space_is_what_the_cache_can_answer() {
    let bench = Bench::new();
    bench.cache("compact", 40, &["--tier", "compact", "--rate", "200"]);
    bench.cache("sparse", 40, &["--tier", "sparse"]);
    let search = |cache: &str, more: &[&str]| {
        let out = format!("study-of-{cache}");
        let common = [
            "search",
            "--cache",
            cache,
            "--student",
            "teacher",
            "--out",
            &out,
            "--trials",
            "6",
            "--validation",
            "0.3",
            "--fraction",
            "0.5",
            "--allow-low-fidelity",
        ];
        bench.run(&[&common, more].concat())
    };
    let output = search("compact", &["--json"]);
    let said = stderr(&output);
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("note: `layers` = last is not searched: the cache holds no teacher layer"),
        "{said}"
    );
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["complete"], 6, "{found}");
    assert_eq!(found["best"]["params"]["layers"], "none");
    // The same again is the same study.
    let output = search("compact", &["--resume"]);
    assert!(output.status.success(), "{}", stderr(&output));

    // So is a space whose S(x) is measured on the cache, the second time too.
    let measured = ["--cache", "compact", "--student", "teacher", "--json"];
    for (trial, more) in [&["--space", "table2"][..], &["--space", "table2"], &[]]
        .into_iter()
        .enumerate()
    {
        let asked = bench.json(&[&["ask", "asked"], more, &measured].concat());
        assert_eq!(asked["trial"], trial);
        assert_eq!(asked["params"]["layers"], "none");
    }

    let output = search("sparse", &[]);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        said.contains("cannot be answered by this sparse cache") && said.contains("hint:"),
        "{said}"
    );
    assert!(!said.contains("trial"), "{said}");
    assert!(!bench.path("study-of-sparse").exists());
}

#[test]
fn halving_pauses_and_goes_on_bit_for_bit() {
    let bench = Bench::new();
    bench.cache("cache", 60, &[]);
    let search = |out: &str, more: &[&str]| {
        bench.json(
            &[
                &[
                    "search",
                    "--cache",
                    "cache",
                    "--student",
                    "teacher",
                    "--out",
                    out,
                    "--trials",
                    "4",
                    "--fraction",
                    "0.5",
                    "--validation",
                    "0.3",
                    "--sampler",
                    "random",
                    "--set",
                    "epochs=4",
                    "--json",
                ],
                more,
            ]
            .concat(),
        )
    };
    let halved = search("halved", &["--halving", "--eta", "2", "--rungs", "2"]);
    search("whole", &[]);
    assert_eq!(halved["best"]["rung"], 1);
    assert_eq!(halved["rungs"][0]["promoted"], 2);
    // What was paused and went on has the weights of the training that was not.
    let mut same = 0;
    for trial in 0..4 {
        let adapter = |out: &str| {
            std::fs::read(bench.path(&format!(
                "{out}/trials/{trial:05}/run/adapter/adapter_model.safetensors"
            )))
            .ok()
        };
        if let Some(halved) = adapter("halved") {
            assert_eq!(Some(halved), adapter("whole"));
            same += 1;
        }
    }
    assert_eq!(same, 2);
}

#[test]
fn any_setting_of_the_trainer_can_be_searched() {
    let bench = Bench::new();
    bench.cache("cache", 60, &[]);
    let search = |out: &'static str, space: &'static str| {
        std::fs::write(bench.path("space.toml"), space).unwrap();
        vec![
            "search",
            "--cache",
            "cache",
            "--student",
            "teacher",
            "--out",
            out,
            "--space",
            "space.toml",
            "--config",
            "base.toml",
            "--trials",
            "6",
            "--fraction",
            "0.3",
            "--validation",
            "0.3",
            "--set",
            "max_steps=2",
            "--json",
        ]
    };
    std::fs::write(
        bench.path("base.toml"),
        "[[loss]]\nkind = \"cross-entropy\"\n[[loss]]\nkind = \"kl\"\n",
    )
    .unwrap();
    let found = bench.json(&search(
        "study",
        "[[param]]\nname = \"learning_rate\"\nkind = \"float\"\nlow = 1e-5\nhigh = 1e-2\nlog = true\n\
         [[param]]\nname = \"lora.rank\"\nkind = \"ordinal\"\nvalues = [1, 2, 4]\n\
         [[param]]\nname = \"loss.1.temperature\"\nkind = \"int\"\nlow = 1\nhigh = 8\n",
    ));
    assert_eq!(found["complete"], 6);
    let best = std::fs::read_to_string(bench.path("study/best.toml")).unwrap();
    let temperature = found["best"]["params"]["loss.1.temperature"]
        .as_f64()
        .unwrap();
    assert!(
        best.contains(&format!("temperature = {temperature:?}")),
        "{best}"
    );
    for (space, said) in [
        (
            "[[param]]\nname = \"lerning_rate\"\nkind = \"int\"\nlow = 1\nhigh = 2\n",
            "did you mean `learning_rate`?",
        ),
        (
            "[[param]]\nname = \"kd_type\"\nkind = \"categorical\"\nvalues = [\"kl\", \"mse\"]\n",
            "dual-scaling",
        ),
        (
            "[[param]]\nname = \"loss.2.weight\"\nkind = \"int\"\nlow = 1\nhigh = 2\n",
            "loss.0",
        ),
        (
            "[[param]]\nname = \"seed\"\nkind = \"int\"\nlow = 1\nhigh = 2\n",
            "can't be searched",
        ),
    ] {
        refused(&bench, &search("never", space), &[said]);
        assert!(!bench.path("never").exists());
    }
}

#[test]
fn the_best_few_go_on_to_more_data() {
    let bench = Bench::new();
    bench.cache("cache", 60, &[]);
    let found = bench.json(&[
        "search",
        "--cache",
        "cache",
        "--student",
        "teacher",
        "--out",
        "study",
        "--trials",
        "5",
        "--fractions",
        "0.2,1",
        "--promote",
        "3",
        "--validation",
        "0.3",
        "--set",
        "max_steps=2",
        "--trust",
        "-1",
        "--json",
    ]);
    assert_eq!(found["trials"], 8);
    assert_eq!(found["best"]["rung"], 1);
    assert_eq!(found["rungs"][0]["pairs"], 3);
    bench.ok(&["report", "study", "--out", "report.html"]);
}
