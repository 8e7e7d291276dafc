# The C++ tests: every file under tests/cpp, linked with the core's objects so that the insides can
# be tested. Each test runs in a process of its own.
find_package(GTest REQUIRED)
include(GoogleTest)

# Stands in for libcuda: where a library of that name is loaded, dlopen finds it by this SONAME. Not
# instrumented, as libcuda is not: its functions have other types than cuda.h says.
add_library(fake_libcuda MODULE "${CMAKE_CURRENT_SOURCE_DIR}/tests/fake_libcuda/fake_libcuda.cpp")
target_link_options(fake_libcuda PRIVATE LINKER:-soname,libcuda.so.1)
set_target_properties(fake_libcuda PROPERTIES NO_SONAME ON)

file(GLOB_RECURSE test_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/tests/cpp/*.cpp")
add_executable(cumempool_tests ${test_sources})
add_dependencies(cumempool_tests fake_libcuda)
target_compile_definitions(cumempool_tests PRIVATE FAKE_LIBCUDA="$<TARGET_FILE:fake_libcuda>")
target_include_directories(cumempool_tests PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/tests/cpp")
target_link_libraries(cumempool_tests PRIVATE cumempool_core cumempool_flags GTest::gtest_main)
gtest_discover_tests(cumempool_tests DISCOVERY_MODE PRE_TEST PROPERTIES TIMEOUT 300)
