#!/bin/bash
# What cannot be done: each command fails with 125, says in one clear error why and what to do, and leaves nothing behind.
#
#   bad_input.sh IMAGE_DIRECTORY      with flyrun in PATH, where /dev/kvm works
# shellcheck disable=SC2016 # the commands are expanded by the shell that runs them
set -u
busybox=oci:$1/oci/busybox
export busybox
# shellcheck source=tests/e2e/try.sh
source "$(dirname "$0")/try.sh"

try 0 '*' 'flyrun run --rm $busybox true'
remember

# images
refuse '*nonsense*' 'flyrun run --rm oci:/nonsense true'
refuse '*nonsense*' 'flyrun create oci-archive:/nonsense.tar'
refuse '*is not an image*' 'flyrun run --rm "a b" true'
refuse '*is not an image*' 'flyrun run --rm "" true'
refuse '*is not an image*' 'flyrun run --rm UPPER/Case true'
try 125 '*attempt 5*Connection refused*' 'flyrun run --rm 127.0.0.1:1/no/registry true'
refuse "*--pull*always*" 'flyrun run --rm --pull sometimes $busybox true'
unchanged images

# flags
for flag in --cpus=0 --cpus=33 --cpus=many --memory=1m --memory=x --memory=999999999999999t --disk=1 --disk=-5 --pids-limit=-7 \
    --cpu-shares=1 --restart=maybe --stop-signal=NOPE --stop-timeout=-1 --stop-timeout=999999 --log-opt=max-size=1 --log-opt=x=y \
    --log-driver=syslog --network=a/b --network= --net-backend=magic --dns=here --add-host=x --publish=70000:80 --publish=80:0 \
    --publish=80/icmp --publish=1-9:1-2 --publish=nohost:1:2 --tmpfs=relative --mount=type=tape --mount=nonsense \
    --mount=type=volume,target=/x --volume=a:relative --volume=a/b:/x --workdir=relative --hostname='a b' --env== --env-file=/none \
    --label==x --user=nobody-knows --entrypoint=/none --kernel=/none --disk-bandwidth=fast --disk-bandwidth=1k \
    --disk-bandwidth=2t --disk-iops=-1 --disk-iops=1.5 --net-bandwidth=-1m --net-bandwidth=100 --net-packets=2000000000 --net-packets=1k \
    --health-interval=fast --health-http=x --health-retries=0; do
    if [[ $flag == --entrypoint=* ]]; then
        try 127 '*none*' "flyrun run --rm '$flag' \$busybox true"
    else
        refuse '*' "flyrun run --rm '$flag' \$busybox true"
    fi
done
refuse '*exclude*' 'flyrun run --rm --restart always $busybox true'
refuse '*two volumes or directories*' 'flyrun run --rm -v a:/x -v b:/x $busybox true'
refuse '*mounted twice*' 'flyrun run --rm -v a:/x -v a:/y $busybox true'
refuse '*cannot publish*' 'flyrun run --rm --network none -p 80 $busybox true'
refuse '*vhost*user or auto*' 'flyrun run --rm --net-backend vhost --net-bandwidth 1m $busybox true'
refuse '*without a network*' 'flyrun create --network none --net-packets 100 $busybox true'
refuse '*' 'flyrun run --rm -v "a:/x:rw:ro" $busybox true'
refuse '*unexpected argument*' 'flyrun run --no-such-flag $busybox true'
refuse '*' 'flyrun run'
refuse '*' 'flyrun nonsense'
unchanged flags

# files of apps: what is added to one that is fine
apps=$(mktemp -d)
export apps
for more in 'kil_timeout = 5' 'swap_size_mb = 512' 'kill_signal = "SIGNOPE"' 'kill_timeout = "soon"' 'services = 7' 'build.image = "a/UPPER"' \
    'http_service.internal_port = 0' 'http_service.force_https = true' 'http_service.processes = ["none"]' \
    'http_service.concurrency = { soft_limit = 3, hard_limit = 2 }' 'http_service = { auto_stop_machines = "stop", auto_start_machines = false }' \
    'http_service.min_machines_running = 2' 'services = [{ internal_port = 1 }]' 'services = [{ internal_port = 1, ports = [{ port = 1 }, { port = 1 }] }]' \
    'services = [{ internal_port = 1, ports = [{ port = 1, handlers = ["tls"] }] }]' 'vm.cpus = 99' 'vm.memory = "1mb"' 'vm.gpu_kind = "a10"' \
    'mounts = { source = "a/b", destination = "/d" }' 'mounts = { source = "a", destination = "d" }' 'files = { guest_path = "/f", local_path = "none" }' \
    'flyrun.hostnames = ["a b"]' 'env.FLY_REGION = "x"' 'processes.a = "quote \""' '"\u001b[31m" = 1' 'x' '[' '= 1'; do
    image=nginx
    [[ $more == build.image* ]] && image=
    printf 'app = "a"\n%s%s\n' "${image:+$'build.image = "nginx"\n'}" "$more" > "$apps/fly.toml"
    refuse 'flyrun: /*/fly.toml:[23]:*: *' 'flyrun config validate $apps/fly.toml'
    refuse 'flyrun: /*/fly.toml:[23]:*: *' 'flyrun config show --json $apps/fly.toml'
done
refuse '*no *.toml*' 'rm $apps/fly.toml; flyrun config validate $apps'
refuse '*cannot be read*' 'flyrun config validate $apps/none.toml'
refuse '*cannot be read*' 'flyrun config show $apps'
refuse '*more than 1024 KiB*' 'flyrun config validate /dev/zero'
refuse '*is not UTF-8*' 'printf "\377" > $apps/fly.toml; flyrun config validate $apps/fly.toml'
refuse '*port 5432*raw TCP*' 'for app in a b; do printf "app = \"$app\"\nbuild.image = \"x\"\nservices = { internal_port = 1, ports = { port = 5432 } }\n" > $apps/$app.toml; done; rm $apps/fly.toml; flyrun config validate $apps'
refuse '*' 'flyrun config'
rm -r "$apps"
unchanged config

# names
for name in 'a b' '' '-x' '../x' 'a/b' $'a\nb' $'\e[31mred' 'ä' "$(printf 'n%.0s' {1..64})"; do
    export name
    refuse '*' 'flyrun run --rm --name="$name" $busybox true'
    refuse '*' 'flyrun volume create -- "$name"'
    refuse '*' 'flyrun run --rm -v "$name":/x $busybox true'
done
for command in start stop suspend resume restart kill rm wait inspect logs attach port stats top update\ --cpus=1 'exec %s true' 'rename %s other' 'cp %s:/x /tmp/x'; do
    for name in nosuch '' '../../etc' 'a b' $'\e[31m'; do
        export name
        # shellcheck disable=SC2059 # the command is the format
        if [[ $command == *%s* ]]; then words=$(printf "$command" '"$name"'); else words="$command -- \"\$name\""; fi
        refuse '*' "flyrun $words"
    done
done
unchanged names

# a machine and a volume that are in use
try 0 '*' 'flyrun run -d --name holder -v data:/data -p 127.0.0.1:18081:80 $busybox sleep 100000'
refuse "*'data' is in use*" 'flyrun run --rm -v data:/x $busybox true'
refuse "*belongs to machine holder*" 'flyrun volume rm data'
refuse '*in use*' 'flyrun volume extend data --size 20g'
refuse "*port 18081*in use*" 'flyrun run --rm -p 127.0.0.1:18081:80 $busybox true'
refuse "*the name 'holder' belongs to*" 'flyrun create --name holder $busybox true'
refuse '*it is started*' 'flyrun rm holder'
try 0 '*' 'flyrun create --name other $busybox true'
remember
refuse "*the name 'holder' belongs to*" 'flyrun rename other holder'
refuse "*" 'flyrun exec other true'
refuse '*is created*flyrun start*' 'flyrun suspend other'
refuse '*is created*flyrun start*' 'flyrun resume other'
refuse '*' 'flyrun kill other'
refuse '*' 'flyrun kill -s NOPE holder'
refuse '*' 'flyrun logs --tail few holder'
refuse '*' 'flyrun exec -w relative holder true'
refuse '*' 'flyrun cp holder:/none /tmp/none'
refuse '*' 'flyrun cp /none holder:/tmp'
refuse '*' 'flyrun cp /etc/hostname /tmp/x'
unchanged use
refuse '*flyrun start*' 'flyrun snapshot create other'
try 0 'other' 'flyrun rm other'
remember

# snapshots
for command in 'snapshot create' 'snapshot inspect' 'snapshot rm' 'snapshot export' 'run --rm --from-snapshot' 'create --from-snapshot'; do
    for name in nosuch '' '../machines' 'a b' $'\e[31m'; do
        export name
        refuse '*no *' "flyrun $command \"\$name\""
    done
done
refuse '*cannot be a snapshot*' 'flyrun snapshot create --name "a b" holder'
refuse "*writes to volume 'data'*" 'flyrun snapshot create holder'
for input in /none /etc /etc/passwd /dev/null /dev/urandom "$FLYRUN_ROOT/machines" "$(readlink -f "$(command -v flyrun)")"; do
    export input
    refuse '*cannot *' 'flyrun snapshot import "$input"'
    refuse '*cannot import*' 'head -c 1000000 "$input" 2> /dev/null | flyrun snapshot import'
done
refuse '*cannot be a snapshot*' 'flyrun snapshot import --name ../x /dev/null'
refuse '*' 'flyrun snapshot'
refuse '*' 'flyrun snapshot nonsense'
unchanged snapshots
try 0 '*' 'flyrun run -d --name model --network none $busybox sleep 100000; flyrun snapshot create --name warm model'
try 0 'model' 'flyrun rm -f model'
export file=/tmp/warm-$$
try 0 '' 'flyrun snapshot export warm -o $file'
remember
for flag in --env=A=1 --workdir=/x --user=1 --entrypoint=x --cpus=2 --memory=1g --pids-limit=5 --disk=1g --kernel=/x --read-only --tmpfs=/x \
    --volume=data:/x --mount=type=tmpfs,target=/x --disk-iops=5 --net-packets=5 --publish-all --dns=1.1.1.1 --add-host=a:1.1.1.1 \
    --restart=always --health-cmd=x --no-healthcheck --stop-signal=1 --stop-timeout=1 --log-driver=none --log-opt=max-file=1 --pull=never; do
    refuse '*--from-snapshot*cannot be used with*' "flyrun run --rm --from-snapshot warm $flag"
done
refuse '*cannot be used with*' 'flyrun run --rm --from-snapshot warm $busybox true'
refuse '*no standard input*' 'flyrun run --rm --from-snapshot warm -i'
refuse '*no terminal*' 'flyrun run -d --from-snapshot warm -t'
refuse '*no network card*' 'flyrun run --rm --from-snapshot warm --network default'
refuse '*publish*' 'flyrun run --rm --from-snapshot warm -p 80'
refuse '*not a host name*' 'flyrun run --rm --from-snapshot warm --hostname "a b"'
refuse "*cannot be a machine*" 'flyrun run --rm --from-snapshot warm --name "a b"'
refuse "*the name 'holder' belongs to*" 'flyrun run --rm --from-snapshot warm --name holder'
refuse "*the name 'warm' belongs to*" 'flyrun snapshot import $file'
refuse '*cannot write /none/*' 'flyrun snapshot export warm -o /none/x'
refuse '*cannot write*' 'flyrun snapshot export warm -o /etc'
refuse '*No space left*' 'flyrun snapshot export warm > /dev/full'
refuse '*cannot import*' 'head -c 100000 $file | flyrun snapshot import --name other'
refuse '*cannot import*' 'head -c -1 $file | flyrun snapshot import --name other'
unchanged 'bad snapshots'
rm "$file"
try 0 'warm' 'flyrun snapshot rm warm'
remember

# without rights
nobody='setpriv --reuid 65534 --regid 65534 --clear-groups'
export nobody
for command in 'run --rm $busybox true' 'create $busybox' 'volume create x' 'pull $busybox' 'prune' 'stop holder' 'rm -f holder'; do
    refuse '*ermission denied*' "\$nobody flyrun $command"
done
refuse '*' '$nobody flyrun --root /tmp/own-$$ --run-dir /tmp/run-$$ run --rm $busybox true'
unchanged rights

# no space
full=$(mktemp -d)
export full
mount -t tmpfs -o size=48m full "$full"
in_full="FLYRUN_ROOT=$full/root FLYRUN_RUN=$full/run"
export in_full
try 0 '*started' 'env $in_full flyrun run --rm $busybox echo started'
# Without a disk of its own, which would fail with the host's: here the log is what has no room.
try 0 '*' 'env $in_full flyrun run -d --read-only --name live $busybox sh -c "while :; do echo line; sleep 0.1; done"'
dd if=/dev/zero of="$full/fill" bs=4k status=none 2> /dev/null
for command in 'run --rm $busybox true' 'run -d $busybox true' 'create $busybox true' 'volume create x' 'run --rm -v new:/x $busybox true'; do
    try 125 '*No space left on device*' "env \$in_full flyrun $command"
done
try 0 '*started*live' 'env $in_full flyrun ps -a'
try 0 'in' 'env $in_full flyrun exec live echo in'
try 0 'live' 'env $in_full flyrun stop -t 0 live'
# Room for a word about it, and none for its memory: it runs on.
truncate -s -2M "$full/fill"
try 0 'live' 'env $in_full flyrun start live'
try 125 '*No space left on device*' 'env $in_full flyrun suspend live'
try 0 'in' 'env $in_full flyrun exec live echo in'
try 125 '*No space left on device*' 'env $in_full flyrun snapshot create live'
try 0 'in' 'env $in_full flyrun exec live echo in'
try 1 '' 'ls -A $full/root/snapshots | grep -v names'
try 0 '*started*live' 'env $in_full flyrun ps -a'
try 0 'live' 'env $in_full flyrun stop -t 0 live'
rm "$full/fill"
try 0 '*(137)*live' 'env $in_full flyrun ps -a'
try 0 'live' 'env $in_full flyrun start live'
try 0 'live' 'env $in_full flyrun rm -f live'
try 0 'ID*NAME' 'env $in_full flyrun ps -a'
try 0 '' 'ls $full/root/volumes $full/root/machines 2> /dev/null | grep -v : '
umount "$full" && rmdir "$full"

try 0 'holder' 'flyrun rm -f holder'
try 0 'data' 'flyrun volume rm data'
summary
