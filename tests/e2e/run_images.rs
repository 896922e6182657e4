//! Images made from Debian's packages by real tools.

use tests::Flyrun;
use tests::image::{directory, layout};

#[test]
fn python_runs_its_image_s_program_in_its_working_directory() {
    Flyrun::shared()
        .run(&[&layout("python"), "python3", "hello.py", "in a microVM"])
        .end()
        .code(0)
        .prints_something_with("in a microVM");
    let script =
        "import os, sys; assert not os.path.exists('/etc/issue'); print(6 * 7, os.getcwd()); sys.exit(9)";
    Flyrun::shared().run(&[&layout("python"), "python3", "-c", script]).end().code(9).prints("42 /app");
}

#[test]
fn nginx_tells_its_version_and_serves_a_page() {
    Flyrun::shared().run(&[&layout("nginx"), "nginx", "-v"]).end().code(0).complains_about("nginx version");
    let script = "nginx && curl --silent --show-error http://127.0.0.1/ && nginx -s quit";
    Flyrun::shared()
        .run(&[&layout("nginx"), "sh", "-c", script])
        .end()
        .code(0)
        .prints_something_with("Welcome to nginx in a microVM");
}

#[test]
fn postgres_makes_and_serves_a_database_as_its_own_user() {
    let script = "set -e
        initdb --auth=trust > /tmp/initdb.log || { cat /tmp/initdb.log; exit 1; }
        pg_ctl --wait --log=/tmp/server.log start > /dev/null || { cat /tmp/server.log; exit 1; }
        psql --no-psqlrc --tuples-only --no-align --command 'select current_user, 6 * 7' postgres
        pg_ctl --wait --mode=fast stop > /dev/null";
    Flyrun::shared()
        .run(&["--memory", "512m", "-u", "postgres", &layout("postgres"), "bash", "-c", script])
        .end()
        .code(0)
        .prints("postgres|42");
}

#[test]
fn redis_answers_as_the_image_s_user() {
    let script = "id -un; pwd; redis-server --port 6379 --daemonize yes > /dev/null
        until redis-cli ping 2> /dev/null | grep PONG; do sleep 0.2; done
        redis-cli set greeting hello > /dev/null; redis-cli get greeting";
    Flyrun::shared()
        .run(&[&layout("redis"), "sh", "-c", script])
        .end()
        .code(0)
        .prints("redis\n/data\nPONG\nhello");
}

#[test]
fn archives_of_docker_save_and_oci_run_like_the_layout() {
    for file in ["busybox.docker.tar", "busybox.oci.tar"] {
        let path = directory().join("archives").join(file);
        let path = path.display();
        Flyrun::shared().run(&[&format!("{path}"), "echo", file]).end().code(0).prints(file);
    }
    let path = directory().join("archives/redis.oci.tar");
    Flyrun::shared()
        .run(&[&format!("oci-archive:{}", path.display()), "redis-server", "--version"])
        .end()
        .code(0)
        .prints_something_with("Redis server");
    let path = directory().join("archives/python.docker.tar");
    Flyrun::shared()
        .run(&[&format!("docker-archive:{}", path.display()), "python3", "-c", "print(1)"])
        .end()
        .code(0)
        .prints("1");
}

/// skopeo 1.9 labels a plain layer as gzip when it converts a docker-archive; docker and containerd look at the bytes.
#[test]
fn a_plain_layer_that_is_labelled_gzip_runs() {
    Flyrun::shared().run(&[&layout("mislabelled"), "echo", "fine"]).end().code(0).prints("fine");
}
