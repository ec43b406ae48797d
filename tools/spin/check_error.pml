/* The same small model for SPIN: check_error, ordinary overlays, a host, one open file each, syncfs only.
 *
 * It exists to be compared: SPIN and `overt prove` must find the same number of states (tests/prove/test_spin.py), and the
 * benchmark says how fast each is (make bench-prove). What the claims remember is in the state here as it is there.
 *
 * A cursor is 0, or 2k+1: error k, unseen, or 2k+2: error k, seen. Party OVERLAYS is the host.
 */
#ifndef OVERLAYS
#define OVERLAYS 2
#endif
#ifndef ERRORS
#define ERRORS 2
#endif
#define PARTIES (OVERLAYS + 1)

byte s_wb_err, errors;
bool host_told, container_told;

bool mounted[PARTIES], is_open[PARTIES];
byte f_sb_err[PARTIES];
bool struck[PARTIES], waiting[PARTIES];
bool due[PARTIES], again[PARTIES], asked[PARTIES], told[PARTIES], hoping[PARTIES];

#define is_host(p) (p == OVERLAYS)

inline forget_file(p) {
	is_open[p] = 0; f_sb_err[p] = 0; due[p] = 0; again[p] = 0; asked[p] = 0; told[p] = 0; hoping[p] = 0
}

active proctype world() {
	byte p, code;
	mounted[OVERLAYS] = 1;
end:	do
	/* a write is lost */
	:: d_step { errors < ERRORS ->
		errors++;
		s_wb_err = (s_wb_err == 0 -> 1 : (s_wb_err % 2 -> s_wb_err : s_wb_err + 1));
		host_told = 0; container_told = 0;
		p = 0;
		do
		:: p < PARTIES ->
			if
			:: mounted[p] ->
				struck[p] = 1; waiting[p] = 1;
				if
				:: is_open[p] -> due[p] = 1; again[p] = asked[p]; asked[p] = 0; told[p] = 0; hoping[p] = 0
				:: else
				fi
			:: else
			fi;
			p++
		:: else -> break
		od;
		p = 0; code = 0 }
	:: atomic {
		/* somebody does something */
		select (p : 0 .. OVERLAYS);
		if
		:: d_step { !mounted[p] -> mounted[p] = 1; struck[p] = 0; waiting[p] = 0 }
		:: d_step { mounted[p] && !is_open[p] && !is_host(p) -> mounted[p] = 0; struck[p] = 0; waiting[p] = 0 }
		:: d_step { mounted[p] && !is_open[p] ->
			is_open[p] = 1;
			f_sb_err[p] = (s_wb_err % 2 -> 0 : s_wb_err);
			hoping[p] = waiting[p] && !is_host(p) }
		:: d_step { is_open[p] ->
			code = (s_wb_err != f_sb_err[p]);
			if
			:: code -> s_wb_err = s_wb_err + s_wb_err % 2; f_sb_err[p] = s_wb_err
			:: else
			fi;
			asked[p] = asked[p] || struck[p] || is_host(p);
			told[p] = told[p] || (code && (struck[p] || is_host(p)));
			due[p] = 0; again[p] = 0; hoping[p] = 0;
			if
			:: code && is_host(p) -> waiting[p] = 0; host_told = 1
			:: code && !is_host(p) -> waiting[p] = 0; container_told = 1
			:: else
			fi }
		:: d_step { is_open[p] -> forget_file(p) }
		fi;
		p = 0; code = 0 }
	od
}
