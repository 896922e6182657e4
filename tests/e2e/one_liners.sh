#!/bin/bash
# One-liners as a user of docker types them, each with the exit code and the output that it must have.
#
#   one_liners.sh IMAGE_DIRECTORY      with flyrun in PATH, where /dev/kvm works
#
# shellcheck disable=SC2016 # the commands are expanded by the shell that runs them
set -u
busybox=oci:$1/oci/busybox
export busybox
# shellcheck source=tests/e2e/try.sh
source "$(dirname "$0")/try.sh"

# run: the image's process and its exit code
try 0 '*' 'flyrun pull $busybox'
try 0 '*hello' 'flyrun run --rm $busybox echo hello'
try 7 '' 'flyrun run --rm $busybox sh -c "exit 7"'
try 127 '*nosuch*not found*' 'flyrun run --rm $busybox nosuch'
try 126 '*/etc*' 'flyrun run --rm $busybox /etc'
try 137 '' 'flyrun run --rm $busybox sh -c "kill -9 \$\$"'
try 0 'hi' 'echo hi | flyrun run --rm -i $busybox cat'
try 0 'A=1' 'flyrun run --rm -e A=1 $busybox sh -c "env | grep ^A="'
try 0 '/srv' 'flyrun run --rm -w /srv $busybox pwd'
try 0 '1000' 'flyrun run --rm -u 1000 $busybox id -u'
try 0 'box' 'flyrun run --rm --hostname box $busybox hostname'
try 125 '*--memory 1 MiB is out of range*' 'flyrun run --rm --memory 1m $busybox true'
try 125 '*nonsense*' 'flyrun run --rm oci:/nonsense true'

# in the background
try 0 '??????????????' 'flyrun run -d --name web -l app=shop --stop-timeout 20 $busybox sh -c "trap \"echo bye; exit 3\" TERM; echo up; echo oops >&2; while :; do sleep 0.1; done"'
try 125 "*the name 'web' belongs to*" 'flyrun run -d --name web $busybox true'
try 125 '*cannot be a machine*' 'flyrun run -d --name "a b" $busybox true'
try 0 '*web' 'flyrun ps'
try 0 'ID*COMMAND*web' 'flyrun ps --filter label=app=shop'
try 0 'ID*NAME' 'flyrun ps --filter label=app=other'
try 125 '*status=nonsense*' 'flyrun ps --filter status=nonsense'
try 0 '"started"' 'flyrun ps --json | python3 -c "import json,sys; print(json.dumps(json.load(sys.stdin)[0][\"state\"]))"'
try 0 'shop' 'flyrun inspect web | python3 -c "import json,sys; print(json.load(sys.stdin)[0][\"config\"][\"labels\"][\"app\"])"'
# Two streams are in no order.
try 0 $'oops\nup' 'until [ "$(flyrun logs web 2>&1 | wc -l)" = 2 ]; do sleep 0.1; done; flyrun logs web 2>&1 | sort'
try 0 'up' 'flyrun logs web 2> /dev/null'
try 0 'oops' 'flyrun logs web 2>&1 > /dev/null'
try 0 '1' 'flyrun logs --tail 1 web 2>&1 | wc -l'
try 0 '20*T*Z up' 'flyrun logs --timestamps web 2> /dev/null'
try 0 '' 'flyrun logs --until 2020-01-01 web'
try 125 '*not a time*' 'flyrun logs --since yesterday web'
try 0 'web' 'flyrun start web'
try 125 'flyrun: web: it is started*' 'flyrun rm web'
try 0 '' 'flyrun rename web www'
try 125 "*no machine 'web'*" 'flyrun stop web'
try 0 'www' 'flyrun stop www'
try 0 '*stopped (3)*www' 'flyrun ps -a'
try 0 'ID*NAME' 'flyrun ps'
try 0 '3' 'flyrun wait www'
try 0 '*bye' 'flyrun logs www'
try 0 'www' 'flyrun stop www'
try 125 '*not running (stopped)*flyrun start*' 'flyrun kill www'
try 0 'www' 'flyrun restart www; until [ "$(flyrun logs www 2> /dev/null | grep -c up)" = 2 ]; do sleep 0.1; done'
try 0 'www' 'flyrun kill -s TERM www'
try 0 '3' 'flyrun wait www'
try 0 'www' 'flyrun start www'
try 0 'www' 'flyrun kill www'
try 0 '137' 'flyrun wait www'
try 125 '*not a signal*' 'flyrun kill -s NOPE www'
try 0 'www' 'flyrun rm www'
try 125 "*no machine 'www'*flyrun ps -a*" 'flyrun inspect www'

# create, and a disk that stays
try 0 '??????????????' 'flyrun create --name job $busybox sh -c "echo run >> /runs; wc -l < /runs"'
try 0 '*created*job' 'flyrun ps -a --filter name=job'
try 0 $'job\n0' 'flyrun start job; flyrun wait job'
try 0 $'job\n0' 'flyrun start job; flyrun wait job'
try 0 $'1\n2' 'flyrun logs job'
try 0 'job' 'flyrun rm job'

# pause
try 0 '??????????????' 'flyrun run -d --name ticker $busybox sh -c "i=0; while :; do i=\$((i+1)); echo \$i; sleep 0.05; done"'
try 0 'ticker' 'flyrun pause ticker'
try 0 'ticker' 'flyrun pause ticker'
try 0 '*(paused)*ticker' 'flyrun ps --filter status=paused'
try 0 'same' 'sleep 0.3; a=$(flyrun logs ticker | wc -l); sleep 1; b=$(flyrun logs ticker | wc -l); [ $a = $b ] && echo same'
try 125 '*is paused*flyrun unpause*' 'flyrun exec ticker true'
try 125 '*is paused*flyrun unpause*' 'flyrun kill ticker'
try 125 '*is paused*' 'flyrun start ticker'
try 0 'ticker' 'flyrun unpause ticker'
try 0 'more' 'a=$(flyrun logs ticker | wc -l); until [ "$(flyrun logs ticker | wc -l)" -gt $((a + 5)) ]; do sleep 0.1; done; echo more'
try 0 'in' 'flyrun exec ticker echo in'
try 0 '' 'flyrun logs --kernel ticker | grep -i -e lockup -e stall || true'
try 0 $'ticker\nticker' 'flyrun pause ticker; flyrun stop -t 1 ticker'
try 0 '*stopped (1*' 'flyrun ps -a --filter name=ticker'
try 125 '*is stopped*flyrun start*' 'flyrun pause ticker'
try 0 $'ticker\nticker\nticker' 'flyrun start ticker; flyrun pause ticker; flyrun rm -f ticker'

# suspend
try 0 '??????????????' 'flyrun run -d --name sleeper -p 127.0.0.1:18090:80 $busybox sh -c "i=0; while :; do i=\$((i+1)); echo \$i; sleep 0.05; done"'
try 0 'sleeper' 'flyrun suspend sleeper'
try 0 'sleeper' 'flyrun suspend sleeper'
try 0 '*suspended*sleeper' 'flyrun ps'
try 0 '' 'pgrep -f flyrun-vmm.*$FLYRUN_RUN; ip -o link show | grep fly; true'
try 125 '*is suspended*flyrun resume*' 'flyrun exec sleeper true'
try 125 '*is suspended*' 'flyrun pause sleeper'
try 125 '*is suspended*flyrun resume*' 'flyrun wait sleeper'
try 0 '1' 'flyrun prune > /dev/null; flyrun ps -q | wc -l'
try 0 $'flyrun: sleeper: resumed\nsleeper' 'flyrun resume sleeper'
try 0 'more' 'a=$(flyrun logs sleeper | wc -l); until [ "$(flyrun logs sleeper | wc -l)" -gt $((a + 5)) ]; do sleep 0.1; done; echo more'
try 0 'in order' 'flyrun logs sleeper > /tmp/one-$$; seq 1 "$(wc -l < /tmp/one-$$)" | cmp - /tmp/one-$$ && echo in order; rm /tmp/one-$$'
try 0 'resumed' 'flyrun inspect sleeper | python3 -c "import json,sys; print(json.load(sys.stdin)[0][\"last_start\"][\"kind\"])"'
try 0 '127.0.0.1:18090' 'flyrun port sleeper 80'
try 0 'True' 'flyrun usage --json sleeper | python3 -c "import json,sys; print(json.load(sys.stdin)[0][\"suspended_s\"] > 0)"'
try 0 $'sleeper\nsleeper\nsleeper' 'flyrun pause sleeper; flyrun resume sleeper; flyrun resume sleeper'
try 0 $'sleeper\nsleeper\nin' 'flyrun suspend sleeper; flyrun start sleeper; flyrun exec sleeper echo in'
try 0 $'sleeper\nsleeper' 'flyrun suspend sleeper; flyrun stop sleeper'
try 0 '*stopped (137)*' 'flyrun ps -a --filter name=sleeper'
try 125 '*is stopped*flyrun start*' 'flyrun resume sleeper'
try 0 $'sleeper\nsleeper\nsleeper' 'flyrun start sleeper; flyrun suspend sleeper; flyrun rm -f sleeper'

# snapshots
try 0 '??????????????' 'flyrun run -d --name model --network none $busybox sh -c "i=0; while :; do i=\$((i+1)); echo \$i; sleep 0.05; done"'
try 0 '??????????????' 'until [ "$(flyrun logs model | wc -l)" -gt 5 ]; do sleep 0.1; done; flyrun snapshot create --name warm model'
try 0 '*started*model' 'flyrun ps'
try 125 "*the name 'warm' belongs to snapshot*" 'flyrun snapshot create --name warm model'
try 0 'ID*MACHINE*model*256 MiB*warm' 'flyrun snapshot ls'
try 0 'warm model 268435456' 'flyrun snapshot ls --json | python3 -c "import json,sys; s = json.load(sys.stdin)[0]; print(s[\"name\"], s[\"machine\"][\"name\"], s[\"memory\"])"'
try 0 'True' 'flyrun snapshot inspect warm | python3 -c "import json,sys; h = json.load(sys.stdin)[0][\"header\"]; print(len(h[\"cpu\"][\"features\"]) == 64 and h[\"memory\"][\"bytes\"] == 268435456)"'
try 0 '??????????????' 'flyrun run -d --name two --from-snapshot warm'
try 0 'goes on' 'until [ "$(flyrun logs two | wc -l)" -gt 5 ]; do sleep 0.1; done; [ "$(flyrun logs two | head -n 1)" -gt 5 ] && echo goes on'
try 0 'other' '[ "$(flyrun exec two hostname)" = "$(flyrun exec model hostname)" ] || echo other'
try 0 '??????????????' 'flyrun create --name three --from-snapshot warm'
try 0 '*suspended*three' 'flyrun ps --filter name=three'
try 0 $'three\nresumed' 'flyrun start three; flyrun inspect three | python3 -c "import json,sys; print(json.load(sys.stdin)[0][\"last_start\"][\"kind\"])"'
# Where a file's holes are is not what it says: on a tmpfs a guest that reads one fills it. What is in the files is in the digests.
try 0 'whole' 'told() { zstd -dqc | tar -xO snapshot.json; }; flyrun snapshot export warm -o /tmp/warm-$$; flyrun snapshot export warm | told | cmp - <(told < /tmp/warm-$$) && echo whole; zstd -tq /tmp/warm-$$; rm /tmp/warm-$$'
try 0 $'warm\n??????????????\nwarm' 'flyrun snapshot export warm > /tmp/warm-$$; flyrun snapshot rm warm; flyrun snapshot import < /tmp/warm-$$; flyrun snapshot ls --json | python3 -c "import json,sys; print(json.load(sys.stdin)[0][\"name\"])"; rm /tmp/warm-$$'
try 0 $'model\n??????????????\nresumed' 'flyrun rm -f model; flyrun run -d --name four --from-snapshot warm; flyrun inspect four | python3 -c "import json,sys; print(json.load(sys.stdin)[0][\"last_start\"][\"kind\"])"'
try 125 '*in use by a machine or a snapshot*' 'flyrun rm -f two three four > /dev/null; flyrun rmi $busybox'
try 125 '*--from-snapshot*cannot be used with*--env*' 'flyrun run --from-snapshot warm -e A=1'
try 0 'warm' 'flyrun snapshot rm warm'
try 125 "*no snapshot 'warm'*flyrun snapshot ls*" 'flyrun snapshot rm warm'
try 0 '' 'ls $FLYRUN_ROOT/snapshots'

# several at once
try 0 '4' '(for i in 1 2 3 4 5; do (flyrun run -d --name same $busybox sleep 1000 > /dev/null 2>&1 || echo refused) & done; wait) | wc -l'
try 0 '1' 'flyrun ps -q --filter name=same | wc -l'
try 0 $'same\nsame\nsame' 'for i in 1 2 3; do flyrun stop -t 0 same & done; wait'
try 0 $'same\nsame\nsame' 'for i in 1 2 3; do flyrun start same & done; wait'
try 0 'in' 'flyrun exec same echo in'
try 0 '*same*' 'for i in 1 2 3; do flyrun rm -f same & done; wait'
try 0 'ID*NAME' 'flyrun ps -a --filter name=same'

# restart policies
try 0 '??????????????' 'flyrun run -d --name flap --restart on-failure:2 $busybox sh -c "echo life; exit 9"'
try 0 $'life\nlife\nlife' 'while flyrun ps -q --filter name=flap | grep -q .; do sleep 0.2; done; flyrun logs flap'
try 0 '*stopped (9)*' 'flyrun ps -a --filter name=flap'
try 0 'flap' 'flyrun rm flap'
try 0 '??????????????' 'flyrun run -d --name always --restart always $busybox sleep 1000'
try 0 'always' 'flyrun stop -t 0 always'
try 0 '*stopped (137)*always' 'sleep 1; flyrun ps -a'
try 0 'always' 'flyrun rm -f always'
try 125 '*not a restart policy*' 'flyrun run -d --restart sometimes $busybox true'
try 125 '*exclude each other*' 'flyrun run --rm --restart always $busybox true'

# --rm in the background
try 0 '??????????????' 'flyrun run -d --rm --name brief $busybox sleep 1000'
try 0 'brief' 'flyrun rm -f brief'
try 0 'ID*NAME' 'flyrun ps -a'
try 127 '*nosuch*not found*' 'flyrun run -d --rm $busybox nosuch'

# logs that are limited, or not kept
try 0 '*' 'flyrun run --name small --log-opt max-size=16k --log-opt max-file=2 $busybox seq 1 5000 > /dev/null'
try 0 '5000' 'flyrun logs --tail 1 small'
try 1 '' 'flyrun logs small | grep -x 1'
try 125 '*max-size*' 'flyrun run --log-opt max-size=1 $busybox true'
try 125 '*keeps no log*' 'flyrun run --name mute --log-driver none $busybox true; flyrun logs mute'
try 0 $'small\nmute' 'flyrun rm small mute'

# volumes
try 0 'data' 'flyrun volume create --size 128m data'
try 125 "*'data' already*" 'flyrun volume create data'
try 0 '' 'flyrun run --rm -v data:/data $busybox sh -c "echo kept > /data/file"'
try 0 'kept' 'flyrun run --rm -v data:/data:ro $busybox cat /data/file'
try 1 '*Read-only file system*' 'flyrun run --rm -v data:/data:ro $busybox touch /data/x'
try 0 'data has 256 MiB now' 'flyrun volume extend data --size 256m'
try 0 '2[0-9][0-9]' 'flyrun run --rm -v data:/data $busybox sh -c "df -m /data | tail -n 1" | tr -s " " | cut -d " " -f 2'
try 125 '*cannot shrink*' 'flyrun volume extend data --size 64m'
try 0 '??????????????' 'flyrun run -d --name holder -v data:/data $busybox sleep 1000'
try 125 "*volume 'data' is in use*" 'flyrun run --rm -v data:/data $busybox true'
try 125 "*belongs to machine holder*" 'flyrun volume rm data'
try 0 'holder' 'flyrun rm -f holder'
try 0 'NAME*data*' 'flyrun volume ls'
try 0 'data' 'flyrun volume rm data'
try 125 "*no volume 'data'*" 'flyrun volume inspect data'
try 0 'tmpfs' 'flyrun run --rm --mount type=tmpfs,target=/scratch $busybox sh -c "grep /scratch /proc/mounts" | cut -d " " -f 1'
try 0 'hi' 'd=$(mktemp -d -p /var/tmp) && echo hi > $d/f && flyrun run --rm -v $d:/d:ro $busybox cat /d/f; rm -r $d'
try 125 '*no directory /none*' 'flyrun run --rm -v /none:/host $busybox true'

# health
try 0 '??????????????' 'flyrun run -d --name sick --health-cmd "test -e /ok || { echo not yet; false; }" --health-interval 200ms --health-retries 2 $busybox sleep 1000'
try 0 '*(unhealthy)*sick' 'until flyrun ps -q --filter health=unhealthy | grep -q .; do sleep 0.2; done; flyrun ps'
try 0 'not yet' 'flyrun inspect sick | python3 -c "import json,sys; print(json.load(sys.stdin)[0][\"health\"][\"checks\"][-1][\"output\"].strip())"'
try 0 '*(healthy)*sick' 'flyrun exec sick touch /ok; until flyrun ps -q --filter health=healthy | grep -q .; do sleep 0.2; done; flyrun ps'
try 0 '' 'flyrun stop -t 0 sick > /dev/null; flyrun ps -aq --filter health=healthy'
try 0 'sick' 'flyrun rm sick'
try 125 '*no health check to change*--health-cmd*' 'flyrun run --rm --health-retries 2 $busybox true'
try 125 '*--health-http*network*' 'flyrun run --rm --network none --health-http 80 $busybox true'

# ports
try 0 '??????????????' 'flyrun run -d --name httpd -p 127.0.0.1:18080:80 -p 81 --health-http /index.html --health-interval 200ms $busybox sh -c "echo page > /index.html; exec busybox httpd -f -p 80 -h /"'
try 0 '127.0.0.1:18080' 'flyrun port httpd 80'
try 0 $'80/tcp -> 127.0.0.1:18080\n81/tcp -> 0.0.0.0:*' 'flyrun port httpd'
try 125 '*no port*82/tcp*' 'flyrun port httpd 82'
try 0 '*127.0.0.1:18080->80/tcp*' 'flyrun ps'
try 0 'page' 'until flyrun ps -q --filter health=healthy | grep -q .; do sleep 0.2; done; curl -s http://$(flyrun port httpd 80)/index.html'
try 125 '*port 18080*in use*' 'flyrun run --rm -p 127.0.0.1:18080:80 $busybox true'

# update and limits
try 0 'httpd' 'flyrun update --label tier=front --restart unless-stopped httpd'
try 0 'front unless-stopped' 'flyrun inspect httpd | python3 -c "import json,sys; c = json.load(sys.stdin)[0][\"config\"]; print(c[\"labels\"][\"tier\"], c[\"restart\"])"'
try 0 $'httpd\n50000 100000' 'flyrun update --cpus 0.5 httpd; cat /sys/fs/cgroup/flyrun/*/cpu.max'
try 0 'flyrun: the memory of httpd*flyrun restart httpd*httpd' 'flyrun update --memory 300m httpd'
try 0 $'httpd\n2[89]????' 'flyrun restart -t 0 httpd; flyrun exec httpd grep MemTotal /proc/meminfo | tr -dc "0-9\n"'
try 0 $'1' 'flyrun exec httpd sh -c "exit 0"; wc -l < $(ls /sys/fs/cgroup/flyrun/*/vmm/cgroup.procs)'
try 125 '*nothing is to be changed*' 'flyrun update httpd'
try 0 'flyrun: the bandwidth of the disks, the rate of packets of httpd*flyrun restart httpd*httpd' 'flyrun update --disk-bandwidth 50m --net-packets 5000 httpd'
try 0 '52428800 5000 None' 'flyrun inspect httpd | python3 -c "import json,sys; l = json.load(sys.stdin)[0][\"config\"][\"limits\"]; print(l[\"disk_bandwidth\"], l[\"net_packets\"], l[\"disk_iops\"])"'
try 0 $'httpd\npage' 'flyrun restart -t 0 httpd; until flyrun ps -q --filter health=healthy | grep -q .; do sleep 0.2; done; curl -s http://$(flyrun port httpd 80)/index.html'
try 0 'flyrun: the bandwidth of the disks of httpd*httpd' 'flyrun update --disk-bandwidth 0 httpd'
try 125 "*'40' is not a number of CPUs*" 'flyrun update --cpus 40 httpd'
try 0 'httpd' 'flyrun rm -f httpd'
try 1 '' 'ls /sys/fs/cgroup | grep flyrun'
try 0 $'5\n*can\'t fork*' 'flyrun run --rm --pids-limit 5 $busybox sh -c "cat /sys/fs/cgroup/pids.max; for i in 1 2 3 4 5 6; do sleep 1 & done; wait" || true'

# usage
try 0 'ID*STARTED*httpd*total' 'flyrun usage'
try 0 'True' 'flyrun usage --json httpd | python3 -c "import json,sys; u = json.load(sys.stdin)[0]; print(u[\"started_s\"] > 0.5 and u[\"cpu_s\"] > 0 and u[\"net_in\"] > 100 and u[\"memory_mib_s\"] > u[\"started_s\"])"'
try 0 'ID*NAME' 'flyrun usage --until 2020-01-01'
try 125 "*nothing was used by a machine 'nobody'*" 'flyrun usage nobody'

# files of apps
apps=$(mktemp -d)
export apps
cat > "$apps/web.toml" << 'EOF'
app = "web"
build.image = "nginx"
[http_service]
internal_port = 80
auto_stop_machines = "suspend"
[flyrun]
hostnames = ["web.example.com"]
EOF
sed 's/web/api/' "$apps/web.toml" > "$apps/api.toml"
try 0 "$apps/web.toml: app web, image nginx, port 80" 'flyrun config validate $apps/web.toml'
try 0 $'*/api.toml: app api, *\n*/web.toml: app web, *' 'flyrun config validate $apps'
try 0 'app = "web"*auto_stop_machines = "suspend"*soft_limit = 20*idle_timeout = "1m"*' 'flyrun config show $apps/web.toml'
try 0 '' 'flyrun config show $apps/web.toml > $apps/shown && flyrun config show $apps/shown | diff - $apps/shown'
try 0 'suspend' 'flyrun config show --json $apps/web.toml | python3 -c "import json,sys; print(json.load(sys.stdin)[\"services\"][0][\"auto_stop_machines\"])"'
try 125 "*web.toml:5:1: there is no key 'auto_stop_machine' in \[http_service\]*Did you mean 'auto_stop_machines'?" 'sed -i s/machines/machine/ $apps/web.toml; flyrun config validate $apps/web.toml'
rm -r "$apps"

# nothing is left
try 0 '' 'flyrun prune > /dev/null; flyrun ps -aq'

summary
